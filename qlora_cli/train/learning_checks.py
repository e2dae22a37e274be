"""Checks whether a run learns, and warns with the likely cause if it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qlora_cli.train.loss_spikes import LossSpikes
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome

ZERO_B_STEPS = 10
"""Steps after which B of at least one layer must differ from its initial value, zero."""
WINDOW = 10
"""Number of steps over which losses are averaged."""
LOSS_STEPS = 50
"""Steps after which the mean loss must be lower than at the start."""
_ROWS_HINT = "check the trained tokens with `qlora data RECIPE --show 3`"


@dataclass
class LearningChecks:
    """Collects the outcomes of a process's steps. Each cause of a warning is reported once.

    It reads values that the step has on the CPU already, and B once, one tensor at a time on the
    CPU, so that it needs no memory on the device.
    """

    state: State
    spikes: LossSpikes
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    _zero_gradients: int = 0

    def after_step(self, outcome: StepOutcome, lr: float) -> Iterator[str]:
        """Add a step and yield the warnings that are due after it. lr: of the step."""
        self.losses.append(outcome.loss)
        self.skipped += outcome.skipped
        yield from self.spikes.after_step(outcome)
        yield from self._zero_gradient(outcome)
        if self.state.step == ZERO_B_STEPS == len(self.losses) and self._is_b_zero():
            yield self._zero_b(lr)
        if len(self.losses) == LOSS_STEPS:
            yield from self._flat_loss()

    def _zero_gradient(self, outcome: StepOutcome) -> Iterator[str]:
        if outcome.skipped or outcome.grad_norm > 0:
            self._zero_gradients = 0
            return
        self._zero_gradients += 1
        if self._zero_gradients == 2:
            yield (
                f"warning: step {self.state.step}: the gradient has been zero in two steps, so "
                "nothing is learned. Likely cause: the adapter does not affect a trained token, or "
                f"gradients underflow; {_ROWS_HINT}, or use adapter.dtype=float32"
            )

    def _is_b_zero(self) -> bool:
        pieces = zip(self.state.trainable, self.state.division.pieces, strict=True)
        own = [piece for name, piece in pieces if ".lora_b." in name]
        is_any = self.state.processes.is_any(any(bool(piece.detach().cpu().any()) for piece in own))
        return bool(own) and not is_any

    def _zero_b(self, lr: float) -> str:
        cause = f"the learning rate ({lr:.1e}) is too low for the adapter's dtype; raise train.lr"
        if self.skipped == ZERO_B_STEPS:
            cause = "float16 overflowed in every step; use adapter.dtype=float32"
        elif self._zero_gradients:
            cause = f"the gradient is zero; {_ROWS_HINT}"
        return (
            f"warning: B is still zero after {ZERO_B_STEPS} steps, so the adapter does nothing. "
            f"Likely cause: {cause}"
        )

    def _flat_loss(self) -> Iterator[str]:
        first, last = (sum(part) / WINDOW for part in (self.losses[:WINDOW], self.losses[-WINDOW:]))
        if last < first:
            return
        peak = self.state.recipe.train.lr
        cause = (
            f"the learning rate is too high; lower train.lr ({peak:g})"
            if last > 1.1 * first
            else f"the learning rate is too low; raise train.lr ({peak:g}), or the base "
            f"predicts these rows well already; {_ROWS_HINT}"
        )
        yield (
            f"warning: the loss does not fall: {first:.3f} in the first {WINDOW} steps, {last:.3f} "
            f"in steps {LOSS_STEPS - WINDOW + 1} to {LOSS_STEPS}. Likely cause: {cause}"
        )
