"""The protocol of an adapter method: what a training method changes in a model.

To add a method, write one file next to this one, add one line to `registry.py` and add the name to
`adapter.method` in `recipe/schema.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from qlora_cli.nn.expert_stack import AdaptedStack, ExpertStack
from qlora_cli.nn.lora_matmul import AdaptedLinear
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site


class AdapterMethod(Protocol):
    """A way to train a model.

    `models/build.py` calls the methods in the order in which they are defined here.
    """

    @property
    def name(self) -> str:
        """The value of `adapter.method` in a recipe."""

    @property
    def freezes_base(self) -> bool:
        """Whether the base is frozen.

        If True, `build` packs the linears and replaces embeddings, norms and MLPs by layers that
        compute no gradients of their weights. If False, transformers' own modules are trained.
        """

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return path -> roles with an adapter. Raises ProblemsError for an unknown target."""

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> AdaptedLinear:
        """Return the layer that replaces a packed linear.

        lora_slices: adapted role -> its rows of the weight. The layer's `delta` is what merging
        adds to the weight.
        """

    def wrap_stack(self, stack: ExpertStack) -> AdaptedStack:
        """Return the module that replaces the packed weights of experts with an adapter."""

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Create the method's own parameters on `device`, after the base is loaded."""

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield the parameters that the optimizer updates. All others are frozen."""

    def lr_factors(self, model: nn.Module) -> Mapping[nn.Parameter, float]:
        """Return the factor of the learning rate of each parameter whose factor is not 1."""
