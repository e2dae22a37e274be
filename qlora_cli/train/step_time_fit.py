"""Fits the time of optimizer steps to the steps that a process has measured.

The time of a step is a fixed part for each of its micro-batches (dequantizing the weights, starting
kernels) and a part that grows with its tokens. The plan gives the ratio of the two, and measured
steps of different sizes correct it: a linear regression that begins at the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

_NOISE = 0.2
"""Assumed deviation of one step's time, as a share of the mean."""
_KEPT = 0.98
"""What a step counts at most, beside the one after it: other programs change the speed. The first
steps count even less, because they are slow until memory is allocated and caches are filled."""
_UNCERTAINTY = np.array([0.5, 0.5, 1.0])
"""Assumed deviation of the planned seconds of each part, as a share of them."""


@dataclass(frozen=True)
class StepWork:
    """The sizes that the time of optimizer steps depends on; may be a sum over several steps.

    steps: number of steps. micro_batches: number of micro-batches. tokens: of all micro-batches.
    pairs: the sum over micro-batches of tokens x longest row, which attention grows with. tracked:
    number of micro-batches that are computed with the memory tracker.
    """

    steps: float = 0.0
    micro_batches: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    tracked: float = 0.0

    def plus(self, other: StepWork) -> StepWork:
        """Return the sum of both."""
        return StepWork(
            self.steps + other.steps,
            self.micro_batches + other.micro_batches,
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.tracked + other.tracked,
        )

    def times(self, factor: float) -> StepWork:
        """Return `factor` times this work."""
        return StepWork(
            self.steps * factor,
            self.micro_batches * factor,
            self.tokens * factor,
            self.pairs * factor,
            self.tracked * factor,
        )


@dataclass(frozen=True)
class PlannedTime:
    """Planned seconds of the parts of a step.

    update: of one update of the parameters. micro_batch: what each micro-batch takes in addition to
    its tokens. token: per token. pair: per token and token of the longest row. tracker: what the
    memory tracker adds to a micro-batch. forward_share: time of a forward pass alone, divided by
    that of forward and backward pass. source: of the seconds; empty if only their ratios are known.
    is_measured: an earlier run of the same kind took so long.
    """

    update: float = 0.0
    micro_batch: float = 0.0
    token: float = 1.0
    pair: float = 0.0
    tracker: float = 0.0
    forward_share: float = 1 / 3
    source: str = ""
    is_measured: bool = False

    def parts(self, work: StepWork) -> NDArray[np.float64]:
        """Return the planned seconds of the fixed part, of the tokens and of the tracker."""
        return np.array(
            [
                self.update * work.steps + self.micro_batch * work.micro_batches,
                self.token * work.tokens + self.pair * work.pairs,
                self.tracker * work.tracked,
            ]
        )

    def scaled(self, factor: float, source: str, is_measured: bool) -> PlannedTime:
        """Return the same ratios with all seconds multiplied by `factor`."""
        seconds = ("update", "micro_batch", "token", "pair", "tracker")
        changed = {name: getattr(self, name) * factor for name in seconds}
        return replace(self, **changed, source=source, is_measured=is_measured)


@dataclass
class StepTimeFit:
    """The time of steps, from the plan and the steps that were measured.

    The first step is not used once there is another one, because kernels and memory are initialized
    in it.
    """

    planned: PlannedTime
    _first: tuple[NDArray[np.float64], float] | None = None
    _added: int = 0
    _count: float = 0.0
    _products: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))
    _targets: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    _seconds: float = 0.0

    def add(self, work: StepWork, seconds: float) -> None:
        """Add one measured step."""
        parts = self.planned.parts(work)
        if self._first is None:
            self._first = parts, seconds
            return
        self._added += 1
        kept = min(_KEPT, 1 - 1 / self._added)
        self._count = kept * self._count + 1
        self._products = kept * self._products + np.outer(parts, parts)
        self._targets = kept * self._targets + parts * seconds
        self._sums = kept * self._sums + parts
        self._seconds = kept * self._seconds + seconds

    def seconds(self, work: StepWork) -> float:
        """Return the estimated time of `work`; without a measured step, the planned time."""
        return float(self.planned.parts(work) @ self._factors())

    def _factors(self) -> NDArray[np.float64]:
        """Return the measured seconds of each part, divided by the planned ones.

        They are those that are most likely if planned seconds and measured steps deviate as assumed
        above. The planned seconds are scaled first, so only their ratio matters.
        """
        if self._first is None:
            return np.ones(3)
        if not self._count:
            return _scaled(*self._first)
        begin = _scaled(self._sums, self._seconds)
        noise = _NOISE * self._seconds / self._count
        precision = np.diag((_UNCERTAINTY * begin) ** -2.0)
        factors = np.linalg.solve(
            precision + self._products / noise**2, precision @ begin + self._targets / noise**2
        )
        positive: NDArray[np.float64] = np.maximum(factors, 0.0)
        return positive


def _scaled(parts: NDArray[np.float64], seconds: float) -> NDArray[np.float64]:
    """Return the factor by which planned seconds are multiplied so that their sum is `seconds`."""
    return np.full(3, max(seconds, 1e-9) / max(float(parts.sum()), 1e-12))
