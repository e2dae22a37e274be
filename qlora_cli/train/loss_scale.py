"""Dynamic loss scaling for float16 training. Source: Micikevicius et al. 2018, section 3.2."""

from __future__ import annotations


class LossScale:
    """A factor on the loss that keeps float16 gradients from underflowing.

    It is halved if gradients overflow (that step is skipped) and doubled after `PATIENCE` steps in
    a row without overflow. If no float16 is involved, the factor is always 1.
    """

    FIRST = 2.0**16
    LEAST = 2.0**-14
    PATIENCE = 2000

    def __init__(self, needed: bool) -> None:
        """needed: whether gradients are computed or stored in float16."""
        self.needed = needed
        self.value = self.FIRST if needed else 1.0
        self._good_steps = 0

    def update(self, finite: bool) -> None:
        """Adjust the factor after a step. finite: whether all gradients of the step were finite."""
        if not self.needed:
            return
        if not finite:
            self.value, self._good_steps = self.value / 2, 0
            return
        self._good_steps += 1
        if self._good_steps == self.PATIENCE:
            self.value, self._good_steps = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether a smaller factor cannot help: gradients overflow for another reason."""
        return not self.needed or self.value < self.LEAST

    def state(self) -> dict[str, float]:
        """Return what a checkpoint stores."""
        return {"value": self.value, "good_steps": float(self._good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Restore the values that `state` returned."""
        self.value, self._good_steps = state["value"], int(state["good_steps"])
