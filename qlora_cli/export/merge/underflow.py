"""Count underflow: values that are not 0 before a cast and 0 after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

_CHUNK_ELEMENTS = 2**18
"""Elements counted at a time, because counting allocates a mask of the same shape."""

Count = Callable[[Tensor, Tensor], None]
"""Called with the values before a cast and the same values after it."""


@dataclass
class Underflow:
    """The underflow of every counted tensor.

    tensors: tensor name -> [values that became 0, values that were not 0].
    """

    tensors: dict[str, list[int]] = field(default_factory=dict)

    def of_tensor(self, name: str) -> Count:
        """Return a function that counts this tensor. It may be called with one chunk at a time."""
        self.tensors[name] = [0, 0]
        return partial(self._count, name)

    def _count(self, name: str, before: Tensor, after: Tensor) -> None:
        chunks = zip(
            before.reshape(-1).split(_CHUNK_ELEMENTS),
            after.reshape(-1).split(_CHUNK_ELEMENTS),
            strict=True,
        )
        for exact, rounded in chunks:
            num = int(exact.count_nonzero())
            self.tensors[name][0] += num - int(rounded.count_nonzero())
            self.tensors[name][1] += num

    def share(self) -> float:
        """Return the share of all values that became 0, among those that were not 0."""
        lost = sum(lost for lost, _ in self.tensors.values())
        return lost / max(sum(num for _, num in self.tensors.values()), 1)

    def largest_share(self) -> tuple[float, str]:
        """Return the largest share that a single tensor lost, and that tensor's name."""
        return max((lost / max(num, 1), name) for name, (lost, num) in self.tensors.items())
