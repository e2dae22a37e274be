"""The arithmetic of a merge: W + scaling * B A, in float64, some rows at a time.

The sum is computed in float64, then rounded to float32 and from there to the output dtype. In
float64 the order in which a matrix product adds its terms changes the sum by so little that two
machines almost always round to the same bits. The rare exception is a sum next to the boundary
between two roundings; `rounds_to` allows for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from qlora_cli.adapters.peft_file import LoraUpdate

CHUNK_ELEMENTS = 2**18
"""Elements summed at a time: 2 MiB in float64, which fits into a processor's cache."""
_RELATIVE_ERROR = 2.0**-44
"""Largest relative difference between two orders of a float64 sum, for ranks up to 256."""


def merged_rows(weight: Tensor, parts: Sequence[LoraUpdate]) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, W + sum over the parts of scaling * B A in these rows), in float64.

    Rows of a part with a magnitude m become m (W + scaling * B A) / ||W + scaling * B A|| (DoRA).

    weight: W (out, in), any floating-point dtype.
    parts: LoRA products; each adds to its own rows of W.

    Every yielded tensor (rows, in) is a view of one buffer, which the next iteration overwrites.
    """
    factors = [(part.rows, part.b.double() * part.scaling, part.a.double()) for part in parts]
    num_rows, width = weight.shape
    step = max(1, CHUNK_ELEMENTS // width)
    buffer = torch.empty(step, width, dtype=torch.float64)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        total = buffer[: rows.stop - start].copy_(weight[rows])
        for own, b, a in factors:
            first, end = max(start, own.start), min(rows.stop, own.stop)
            if first < end:
                total[first - start : end - start].addmm_(b[first - own.start : end - own.start], a)
        for part in parts:
            first, end = max(start, part.rows.start), min(rows.stop, part.rows.stop)
            if part.magnitude is not None and first < end:
                scaled = total[first - start : end - start]
                magnitude = part.magnitude[first - part.rows.start : end - part.rows.start]
                lengths = torch.linalg.vector_norm(scaled, dim=1)
                scaled.mul_((magnitude.double() / lengths)[:, None])
        yield rows, total


def rounds_to(result: Tensor, weight: Tensor, parts: Sequence[LoraUpdate]) -> bool:
    """Return whether `result` is a correct rounding of W + sum of scaling * B A.

    Each value may be the rounding of any number that a float64 sum in another order can give, that
    is, of a number within `_RELATIVE_ERROR` * (|W| + sum of scaling * |B| |A|) of the sum.

    result: (out, in), in the dtype of the merged checkpoint. weight, parts: as in `merged_rows`.
    """
    plain = [replace(part, magnitude=None) for part in parts]
    absolute = [replace(part, a=part.a.abs(), b=part.b.abs()) for part in plain]
    sums, sizes = merged_rows(weight, plain), merged_rows(weight.abs(), absolute)
    is_scaled = any(part.magnitude is not None for part in parts)
    results = merged_rows(weight, parts) if is_scaled else repeat(None)
    for (rows, before), (_, size), scaled in zip(sums, sizes, results, strict=False):
        total, error = before, size * _RELATIVE_ERROR
        if scaled is not None:
            total = scaled[1]
            error = _error_of_rows(total, before, size)
        if not _is_between(result[rows], total - error, total + error):
            return False
    return True


def _error_of_rows(total: Tensor, before: Tensor, size: Tensor) -> Tensor:
    """Return the largest error of rows that are scaled to a length (DoRA).

    total: the scaled rows. before: the sums. size: the sums of absolute values. The relative error
    of a length is at most that of the row, of which a few roundings more are allowed.
    """
    lengths = torch.linalg.vector_norm(before, dim=1, keepdim=True)
    gain = torch.linalg.vector_norm(total, dim=1, keepdim=True) / lengths
    relative = torch.linalg.vector_norm(size, dim=1, keepdim=True) / lengths
    error: Tensor = (gain * size + total.abs() * (relative + 1)) * _RELATIVE_ERROR
    return error


def _is_between(result: Tensor, low: Tensor, high: Tensor) -> bool:
    """Return whether every value is between its bounds, which are rounded to the same dtype.

    Rounding is monotonic, so a rounded sum is between its rounded bounds.
    """
    lower, upper = (bound.float().to(result.dtype) for bound in (low, high))
    return bool(((lower <= result) & (result <= upper)).all())
