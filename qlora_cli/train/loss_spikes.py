"""Report steps whose loss is far above that of the steps before, with the rows that cause it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from qlora_cli.data.packing import BatchSchedule
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome

WINDOW = 20
"""Number of steps that a loss is compared with."""
_FEWEST = 5
"""Number of steps that must have been done."""
_FACTOR, _DIFFERENCE = 2.0, 2.0
"""A spike is larger than the largest loss of the window by this factor and by this difference."""
_DEVIATIONS = 5
"""The logarithm of a spike is also above the window's mean by this number of standard deviations:
the losses of single short rows differ by factors, and none of them is a spike."""
_SMALLEST_LOSS = 1e-6
_NAMED_ROWS = 3
_LARGE_SHARE = 0.5
"""A row is named if its loss is at least this share of the largest one."""


@dataclass
class LossSpikes:
    """Compares the loss of each step with the steps before it.

    Each spike is reported once, at its first step. Its losses are not compared with later ones.
    """

    state: State
    schedule: BatchSchedule
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _is_in_spike: bool = False

    def after_step(self, outcome: StepOutcome) -> Iterator[str]:
        """Add a step and yield the warning that is due after it, if there is one."""
        if outcome.skipped:
            return
        was_in_spike = self._is_in_spike
        self._is_in_spike = len(self._recent) >= _FEWEST and outcome.loss > self._limit()
        if not self._is_in_spike:
            self._recent.append(outcome.loss)
        elif not was_in_spike:
            yield self._describe(outcome.loss)

    def _limit(self) -> float:
        """Return the loss above which a step is a spike."""
        highest = max(self._recent)
        logs = [math.log(max(loss, _SMALLEST_LOSS)) for loss in self._recent]
        usual = math.exp(statistics.fmean(logs) + _DEVIATIONS * statistics.stdev(logs))
        return max(_FACTOR * highest, highest + _DIFFERENCE, usual)

    def _describe(self, loss: float) -> str:
        mean = sum(self._recent) / len(self._recent)
        rows = [f"{origin} ({loss:.1f})" for origin, loss in self._worst_rows()]
        which = f". Rows with the highest loss: {', '.join(rows)}" if rows else ""
        return (
            f"warning: step {self.state.step:,}: the loss rose to {loss:.1f}; its mean over the "
            f"{len(self._recent)} steps before is {mean:.1f}{which}. Look at these rows; if they "
            f"are right, lower train.lr ({self.state.recipe.train.lr:g}) or train.max_grad_norm"
        )

    def _worst_rows(self) -> list[tuple[str, float]]:
        """Return the rows of the last step with the highest losses, the highest first.

        Each row is evaluated alone, without dropout, by the weights after the step. Returns nothing
        if that fails, because the step itself has succeeded.
        """
        step = self.state.step - 1
        most = max(map(len, self.schedule.step_rows(step)))
        losses: list[tuple[str, float]] = []
        try:
            for batch in self.schedule.step_batches(step, most):
                score = self.state.task.evaluate(self.state.loaded, [batch], self.state.device)
                losses.append((batch.origins[0], score.loss))
        except (RuntimeError, MemoryError):  # Such as a lack of memory.
            return []
        losses.sort(key=lambda item: item[1], reverse=True)
        return [item for item in losses[:_NAMED_ROWS] if item[1] >= _LARGE_SHARE * losses[0][1]]
