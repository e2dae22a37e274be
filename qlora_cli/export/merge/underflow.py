"""Counts what a cast loses: values that are not 0 and become 0 in the new dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

_CHUNK = 2**18
"""Elements counted at a time, because counting makes a mask as large."""

Count = Callable[[Tensor, Tensor], None]
"""(values before, the same values after)."""


@dataclass
class Underflow:
    """By tensor: [values that became 0, values that were not 0]."""

    tensors: dict[str, list[int]] = field(default_factory=dict)

    def of_tensor(self, name: str) -> Count:
        """What takes in this tensor, in any number of parts."""
        self.tensors[name] = [0, 0]
        return partial(self._count, name)

    def _count(self, name: str, before: Tensor, after: Tensor) -> None:
        parts = zip(before.reshape(-1).split(_CHUNK), after.reshape(-1).split(_CHUNK), strict=True)
        for exact, made in parts:
            num = int(exact.count_nonzero())
            self.tensors[name][0] += num - int(made.count_nonzero())
            self.tensors[name][1] += num

    def share(self) -> float:
        """Of all values that were not 0."""
        lost = sum(lost for lost, _ in self.tensors.values())
        return lost / max(sum(num for _, num in self.tensors.values()), 1)

    def worst(self) -> tuple[float, str]:
        """(the largest share that one tensor lost, its name)."""
        return max((lost / max(num, 1), name) for name, (lost, num) in self.tensors.items())
