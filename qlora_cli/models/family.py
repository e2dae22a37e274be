"""What the rest of the package knows of a model family: where its linears are and how they lie.

Orientation is settled here. Everywhere else a linear's weight is (out, in) and its parts are named
row sets of that weight; a Conv1D's (in, out) file tensor is turned by `to_module` when it comes in
and by `to_file` when it goes out, and no flag travels further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.files.source import FolderSource
from qlora_cli.nn.mlp import Projections

Rows = Callable[[Any], Mapping[str, slice]]
"""From a transformers config to each role's rows of a fused linear's (out, in) weight."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a block.

    path: within the block, `self_attn.q_proj`. roles: which roles it plays; one for a plain
    projection, several for a fused one. transposed: the file holds (in, out). rows: for a fused
    linear, where each role's outputs lie.
    """

    path: str
    roles: tuple[str, ...]
    transposed: bool = False
    rows: Rows | None = None


@dataclass(frozen=True)
class MlpSpec:
    """The MLP of a block, as down(act(gate) * up) or, without a gate, down(act(up)).

    path: within the block. projections: its linears. activation: config key that names act.
    """

    path: str
    projections: Projections
    activation: str


@dataclass(frozen=True)
class Family:
    """A causal language model's shape.

    model_types: transformers' `model_type` values that share it. blocks: path of the block list.
    backbone: module that turns token ids into hidden states. head: module that turns those into
    logits. embeddings: token and position tables. mlp: of each block, where it has
    this form. norms: RMSNorms within a
    block. final_norm: an RMSNorm behind the last block. dropouts: config keys of the base's own
    dropout, switched off in training (the adapter has its own). ignored: endings of file tensors
    that are buffers a constructor makes anew, not weights.
    """

    name: str
    model_types: tuple[str, ...]
    backbone: str
    blocks: str
    head: str
    embeddings: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    mlp: MlpSpec | None = None
    norms: tuple[str, ...] = ()
    final_norm: str | None = None
    dropouts: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role that a target may name, in the order of the linears."""
        return tuple(role for linear in self.linears for role in linear.roles)

    @property
    def token_embedding(self) -> str:
        """Path of the table that token ids are looked up in."""
        return self.embeddings[0]


def open_source(folder: Path, family: Family) -> FolderSource:
    """Return the tensors of a checkpoint folder under the family's parameter names.

    Raises ModelError if files are missing or damaged.
    """
    return FolderSource(
        folder, prefix=f"{family.backbone}.", head=family.head, ignored=family.ignored
    )
