"""LoRA on the experts of a mixture: W_e + (alpha / rank) B_e A_e for the matrix of each expert e.

A stacked parameter (E, out, in) has one A and one B per expert, which are stacked in the same way.
The router is not changed. Each expert gets gradients from the tokens that are routed to it only.

Shapes: lora_a (E, rank, in), lora_b (E, out, rank).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraSettings, drawn_a
from qlora_cli.adapters.targets import EXPERTS
from qlora_cli.nn.expert_stack import AdaptedStack, ExpertStack, StackLora


class LoraStack(AdaptedStack):
    """The packed weights of a stacked parameter with a LoRA adapter for each expert.

    A and B are in dictionaries with the role `experts`, as those of `LoraLinear` are by role.
    """

    def __init__(self, base: ExpertStack, settings: LoraSettings) -> None:
        super().__init__()
        self.base = base
        self.settings = settings
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        """Draw A from N(0, 1/in) and set B to 0. generator: on the CPU."""
        base, settings = self.base, self.settings
        a_shape = (base.num_experts, settings.rank, base.in_features)
        b_shape = (base.num_experts, base.out_features, settings.rank)
        a = drawn_a(a_shape, settings.dtype, device, generator)
        self.set_factors(a, torch.zeros(b_shape, device=device, dtype=settings.dtype))

    def set_factors(self, a: Tensor, b: Tensor, *, trained: bool = True) -> None:
        """Use these tensors as A (E, rank, in) and B (E, out, rank)."""
        self.lora_a[EXPERTS] = nn.Parameter(a, requires_grad=trained)
        self.lora_b[EXPERTS] = nn.Parameter(b, requires_grad=trained)

    def lora(self) -> StackLora:
        """Return the adapter of one call."""
        a, b = cast(Tensor, self.lora_a[EXPERTS]), cast(Tensor, self.lora_b[EXPERTS])
        return StackLora(a, b, self.settings.scaling)

    def delta(self, expert: int) -> Tensor:
        """Return (alpha / rank) B_e A_e as (out, in) in float32: what merging adds to W_e."""
        lora = self.lora()
        product = lora.b[expert].detach().float() @ lora.a[expert].detach().float()
        return lora.scaling * product
