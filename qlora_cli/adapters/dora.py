"""DoRA: W' = m (W + s B A) / ||W + s B A||, with W packed and frozen (Liu et al. 2024).

The length of each row of the weight is trained apart from its direction. A and B are those of LoRA.
The magnitude m of an adapted row begins as ||W||, so the adapted model equals the base.

W is the dequantized weight. Its lengths are computed once. Then
||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B> needs no matrix of the size of W.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.nn.dora_matmul import DoraMatmul
from qlora_cli.nn.lora_matmul import LoraMatmul
from qlora_cli.nn.quant import QuantLinear


class DoraLinear(LoraLinear):
    """A packed linear with one DoRA adapter for each adapted role.

    lora_magnitude: role -> m, in float32.
    """

    def __init__(
        self, base: QuantLinear, lora_slices: Mapping[str, slice], settings: LoraSettings
    ) -> None:
        super().__init__(base, lora_slices, settings)
        self.lora_magnitude = nn.ParameterDict()
        self._base_lengths: Tensor | None = None
        self._frozen_lengths: list[Tensor] | None = None

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        """Create A, B and m, so that the adapted model equals the base."""
        super().initialize(device, generator)
        for role, rows in self.lora_slices.items():
            self.lora_magnitude[role] = nn.Parameter(self.base_lengths()[rows].clone())

    @torch.no_grad()
    def base_lengths(self) -> Tensor:
        """Return ||W|| of every row (out,) in float32. It is computed once."""
        if self._base_lengths is None:
            weight = self.base.dequantize()
            self._base_lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return self._base_lengths

    def forget_lengths(self) -> None:
        """Compute all lengths again at the next use, because A and B were replaced."""
        self._frozen_lengths = None

    @property
    def joins(self) -> bool:
        """Return False: the gains are computed for one linear."""
        return False

    def start_matmul(self) -> tuple[LoraMatmul, list[Tensor]]:
        """Return (one call with its dropout seed drawn, A and B of each role, then each m)."""
        plain, factors = super().start_matmul()
        matmul = DoraMatmul(
            plain.bases,
            plain.lora_slices,
            plain.scaling,
            plain.dropout,
            plain.seed,
            self._lengths(),
        )
        return matmul, [*factors, *(self.lora_magnitude[role] for role in self.lora_slices)]

    @torch.no_grad()
    def _lengths(self) -> list[Tensor]:
        """Return ||W + s B A|| of each role's rows. Frozen adapters compute them once."""
        if self._frozen_lengths is not None:
            return self._frozen_lengths
        weight, s = self.base.dequantize(), self.settings.scaling
        lengths = []
        for role, rows in self.lora_slices.items():
            a, b = (factor.float() for factor in self._factors(role))
            projected = (weight[rows] @ a.to(weight.dtype).t()).float()
            cross = projected.mul_(2 * s).add_(b @ (a @ a.t()), alpha=s * s).mul_(b).sum(dim=1)
            lengths.append((self.base_lengths()[rows].square() + cross).sqrt_())
        if not any(factor.requires_grad for factor in self.lora_a.values()):
            self._frozen_lengths = lengths
        return lengths

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return W' - W as (out, in) in float32: what merging adds to W."""
        weight = self.base.dequantize().float()
        total = weight + super().delta()
        for role, rows in self.lora_slices.items():
            gain = self.lora_magnitude[role] / torch.linalg.vector_norm(total[rows], dim=1)
            total[rows] *= gain[:, None]
        return total - weight
