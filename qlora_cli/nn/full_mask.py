"""A mask of a sequence without padding, which answers whether it has padding.

Models test `torch.all(mask == 1)` to leave out work for padding. On a GPU this test waits for all
earlier operations, and on meta, where tensors have no values, it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_COMPARISONS = (torch.eq, Tensor.eq, Tensor.__eq__, Tensor.bool)
_TESTS = (torch.all, Tensor.all)


class FullMask(Tensor):
    """A tensor of ones. Use `full_mask` to create it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `func` as for any tensor; the test whether all values are true has no cost."""
        if func in _TESTS and len(args) == 1 and not kwargs:
            return torch.tensor(True, device="cpu")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        is_ones = func in _COMPARISONS and all(item == 1 for item in args[1:])
        return result.as_subclass(cls) if is_ones else result


def full_mask(num_tokens: int, device: torch.device | str) -> Tensor:
    """Return a mask (1, num_tokens) of ones, int64."""
    return torch.ones(1, num_tokens, dtype=torch.long, device=device).as_subclass(FullMask)
