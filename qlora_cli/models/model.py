"""A model that this package trains or generates with: transformers' model with replaced modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.family import Family
from qlora_cli.nn.activation_policy import Recomputation
from qlora_cli.nn.prefix import BlockPrefix
from qlora_cli.nn.site import Site
from qlora_cli.nn.spans import Kernel

if TYPE_CHECKING:
    from qlora_cli.models.placement.block_stream import BlockStream


@dataclass
class LoadedModel:
    """A model that is ready to train or to generate.

    model: transformers' model. sites: every linear that the family describes. adapted: path ->
    roles with an adapter. base_format: format of each linear's weight. kernel: attention kernel
    of the device, in a dry run of the planned device. stacks: every stacked parameter of experts,
    if the experts are packed. loss_chunk: number of tokens whose logits exist at once; None for the
    default. recomputation: which blocks are recomputed in the backward pass; absent if the model
    cannot train. stream: gives blocks their weights while they compute; None if all weights stay in
    place. initial: path -> adapter layer that the model has before training, if that is not
    the packed base alone (`adapter.init`); set for inference. is_residual: the packed base lacks
    the product of these layers.
    """

    model: Any
    family: Family
    config: Any
    sites: list[Site]
    adapted: dict[str, list[str]]
    base_format: BaseFormat
    kernel: Kernel
    stacks: list[Site] = field(default_factory=list)
    loss_chunk: int | None = None
    recomputation: Recomputation = field(init=False, repr=False)
    stream: BlockStream | None = None
    initial: Mapping[str, nn.Module] = field(default_factory=dict)
    is_residual: bool = False

    @property
    def head(self) -> nn.Module:
        """Return the module whose weight (V, d) maps hidden states to logits."""
        return self.model.get_submodule(self.family.head)  # type: ignore[no-any-return]

    @property
    def num_positions(self) -> int | None:
        """Return the maximum number of tokens in a row; None if the config states none."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None:
            return None
        modules = self.model.modules()
        prefix = next((m.length for m in modules if isinstance(m, BlockPrefix)), 0)
        return int(positions) - self.family.rows.first_position - prefix

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of all parameters that the optimizer updates."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def is_tied(loaded: LoadedModel) -> bool:
    """Return whether the token embedding and the head are one parameter."""
    if loaded.family.is_classifier:
        return False
    return f"{loaded.family.head}.weight" in loaded.model.all_tied_weights_keys
