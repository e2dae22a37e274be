"""The description of a model family: the paths of its modules and the layout of its weights.

A family is data. `families/` has one file per family, `registry.py` lists them. The orientation of
a weight is set here (`LinearSpec.transposed`) and applied by `Site` only: everywhere else a weight
is (out, in), and the parts of a fused projection are named sets of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_cli.nn.experts import StackPart
from qlora_cli.nn.logits import IDENTITY, LogitTransform
from qlora_cli.nn.mlp import Projections

Pooling = Literal["first", "last", "mean"]
Rows = Callable[[Any], Mapping[str, slice]]
"""From a transformers config to each role's rows of a fused linear's weight (out, in)."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a block.

    path: path within the block, `self_attn.q_proj`. roles: the names that `adapter.targets` uses,
    one for a plain projection, several for a fused one. transposed: the file stores (in, out).
    rows: for a fused linear, the rows of each role.
    """

    path: str
    roles: tuple[str, ...]
    transposed: bool = False
    rows: Rows | None = None


@dataclass(frozen=True)
class MlpSpec:
    """The MLP of a block that computes down(act(gate) * up) or, without a gate, down(act(up)).

    path: path within the block. projections: names of its linears. activation: key of the config
    that names act.
    """

    path: str
    projections: Projections
    activation: str


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a block, whose projections have the same input.

    path: path within the block. projections: names of its linears, each called once.
    """

    path: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class RowSettings:
    """How the rows in one sequence are computed.

    own_attention: the model's class computes attention itself, and not through transformers'
    interface. packs: rows that share a sequence do not affect each other; otherwise each row is a
    forward pass of its own. mixers: modules of a block that mix tokens, and not through
    transformers' interface; they compute one row at a time. takes_positions: the backbone accepts
    positions. counting_tables: else, position tables that count the tokens. first_position:
    position of the first token of a row. arguments: name of an argument of the backbone -> its
    value, the same for all rows.
    """

    own_attention: bool = False
    packs: bool = True
    mixers: tuple[str, ...] = ()
    takes_positions: bool = True
    counting_tables: tuple[str, ...] = ()
    first_position: int = 0
    arguments: Mapping[str, int] = field(default_factory=dict)


ROWS_TOGETHER = RowSettings()
"""This package's attention separates the rows; all else computes them together."""


@dataclass(frozen=True)
class ClassifierHead:
    """What follows the blocks of a sequence classifier.

    modules: paths of the modules after the blocks, which train in full precision. shapes: name ->
    shape of their parameters. pooling: the token of each row that they get, or the mean of all
    tokens. token_types: the backbone takes the types of tokens.
    """

    modules: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pooling: Pooling = "last"
    token_types: bool = False


NO_CLASSIFIER = ClassifierHead()
"""A causal language model has no such head."""


@dataclass(frozen=True)
class Family:
    """The structure of a causal language model, or of a sequence classifier.

    model_types: the `model_type` values of transformers configs with this structure. backbone: path
    of the module that maps token ids to hidden states. blocks: path of the list of blocks. head:
    path of the module that maps hidden states to logits. embeddings: paths of the token table and,
    after it, of position tables. linears: the linears of a block. mlp: the MLP of a block, if it
    has one of the supported forms. attention: the attention of a block, if its projections may be
    computed together. norms: paths of the RMSNorms within a block. final_norm: path of
    an RMSNorm after the last block. dropouts: config keys of the base's own dropout, which is
    disabled. ignored: endings of file tensors that are buffers and not weights. logits: what the
    model does with the head's output. embedding_scale: factor of the rows of the token table.

    The rest is for derived families. unquantized: linears of a block that stay in 16 bit, because
    the model's code reads their weights directly or does not use them. blocks_differ: a block may
    lack some of the linears, norms and MLPs. rename: from the name of a tensor in a checkpoint to
    that of its parameter; None if only the backbone's prefix may be missing. experts: modules of a
    block with the stacked weights of experts. stacks: parts, in a checkpoint, of the stacked
    parameters that it does not store whole. kept_stacks: weights of a block with more dimensions
    than a matrix, which stay in 16 bit. row_parts: name of a parameter -> the tensors of a
    checkpoint that are its rows, in order. merged_attention: the attention of transformers that
    computes the same model. others: paths of the other parts of a composed model, which are not
    loaded and which a merge copies. other_modules: paths of all modules in these parts.
    has_head_input: the model computes more between the backbone and the head, with code of its own.
    tied: name of a parameter that a checkpoint may omit -> the parameter that it is, apart from a
    tied head's weight. shared: path of a module that a block shares with an earlier one -> path
    there. rows: how rows in one sequence are computed.

    classifier: of a sequence classifier, whose `head` is the last linear; empty for others.
    """

    name: str
    model_types: tuple[str, ...]
    backbone: str
    blocks: str
    head: str
    embeddings: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    mlp: MlpSpec | None = None
    attention: AttentionSpec | None = None
    norms: tuple[str, ...] = ()
    final_norm: str | None = None
    dropouts: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    logits: LogitTransform = IDENTITY
    embedding_scale: float = 1.0
    unquantized: tuple[str, ...] = ()
    blocks_differ: bool = False
    rename: Callable[[str], str] | None = None
    experts: tuple[str, ...] = ()
    stacks: Mapping[str, tuple[StackPart, ...]] = field(default_factory=dict)
    merged_attention: Literal["sdpa", "eager"] = "sdpa"
    others: tuple[str, ...] = ()
    other_modules: tuple[str, ...] = ()
    has_head_input: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    kept_stacks: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    row_parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: RowSettings = ROWS_TOGETHER
    classifier: ClassifierHead = NO_CLASSIFIER

    @property
    def is_classifier(self) -> bool:
        """Return whether the model classifies sequences."""
        return bool(self.classifier.modules)

    @property
    def token_embedding(self) -> str:
        """Return the path of the token table."""
        return self.embeddings[0]
