"""Measures the mean squares of the inputs of each linear, for `base.scales: measured`."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.events import Observer
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.quantize.measurement import MeasuredBase, streamed_model


class _Meter:
    """The sum of the squares of a linear's inputs, and the number of tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (tokens, in)."""
        squares = x.float().square().sum(dim=0).cpu()
        self.total = squares if self.total is None else self.total.add_(squares)
        self.tokens += len(x)

    def mean(self, in_features: int) -> Tensor:
        """Return the mean squares. An expert that no token was sent to has ones."""
        return torch.ones(in_features) if self.total is None else self.total / self.tokens


class _MeteredLinear(QuantLinear):
    """A linear in 16 bit that gives its inputs to a meter."""

    def __init__(self, base: QuantLinear, meter: _Meter) -> None:
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, has_bias, base.weight_format)
        self.meter = meter

    def product(self, x: Tensor) -> Tensor:
        """Return the product of `QuantLinear`."""
        self.meter.add(x)
        return super().product(x)


def measure_inputs(base: MeasuredBase, observer: Observer) -> dict[str, Tensor]:
    """Return path -> mean squares (in,) float32 of the inputs of each linear in the 16-bit base.

    One forward pass in float32 over the rows of `base`; one block is in memory at a time.
    """
    meters = {site.path: _Meter() for site in base.sites}

    def wrap(linear: QuantLinear, site: Site) -> QuantLinear:
        return _MeteredLinear(linear, meters[site.path])

    observer.stage("measure inputs", 1)
    streamed_model(base, base.format_of({}, 16), wrap).compared_logits(base.rows)
    observer.advance(1)
    return {site.path: meters[site.path].mean(site.in_features) for site in base.sites}
