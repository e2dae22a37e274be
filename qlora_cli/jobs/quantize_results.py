"""The result of `qlora quantize`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class MixStep:
    """A base that was measured.

    name: of it. bytes: of the base. overrides: `base.overrides` with base.bits 4. predicted_kl:
    estimated before it was measured; None if it was not. kl: measured. recovered: share of the KL
    of 4 bit that it does not have. counts: bits -> number of linears.
    """

    name: str
    bytes: int
    overrides: Mapping[str, int]
    counts: Mapping[int, int]
    predicted_kl: float | None
    kl: float
    recovered: float


@dataclass(frozen=True)
class LinearCost:
    """A linear. bits: chosen. kl: bits -> estimated KL if this linear alone has them."""

    path: str
    bits: int
    parameters: int
    kl: Mapping[int, float]


@dataclass(frozen=True)
class QuantizeResult(Result):
    """Result of `qlora quantize`; every KL is KL(16 bit || quantized) in nats per token.

    rows: which rows were measured. tokens: predicted tokens. loss_16bit: cross entropy of the
    16-bit model on them. budget_bytes: for the base; None if none was set. target_kl: None if none
    was set. reached: whether the target was reached, True without one. bits_8: the base in 8 bit.
    steps: the measured mixes, from plain 4 bit to the chosen one. linears: the largest share of the
    KL first. out: the recipe that was written. seconds: time of the measurement.
    """

    rows: str
    tokens: int
    loss_16bit: float
    budget_bytes: int | None
    target_kl: float | None
    reached: bool
    bits_8: MixStep
    steps: tuple[MixStep, ...]
    linears: tuple[LinearCost, ...]
    out: Path | None
    seconds: float

    @property
    def plain(self) -> MixStep:
        """Return the base in 4 bit."""
        return self.steps[0]

    @property
    def chosen(self) -> MixStep:
        """Return the base that was found."""
        return self.steps[-1]
