"""The matrix product of LLM.int8(): int8 codes, and outlier columns in the compute dtype.

Shapes: x (tokens, in), y (tokens, out), codes (out, in) int8, scale (out,) float32. Source:
Dettmers et al. 2022 (equations 3 to 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.memory.scopes import scope

OUTLIER_DIVISOR = 8
"""With more than in / 8 outlier columns there is no mixed product. About 0.1 % of the columns are
outliers; the limit bounds the memory of the outlier part, so that it can be planned."""
TINY = torch.finfo(torch.float32).tiny
"""The smallest scale: the values of an all-zero row are divided by it."""

_ops = torch.ops.bitsandbytes


def scaled_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes (out, n) times their scales in `dtype`: scaled in float32, rounded once."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scale[:, None], out=out)


def int8_product(x: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor | None:
    """Return x W^T in the dtype of x, or None if too many columns of x are outliers.

    threshold: columns of x with a value above it are outliers; 0 for none.
    """
    with scope("temporary"):
        magnitudes = x.abs()
        columns = _outlier_columns(magnitudes, threshold)
    if columns.numel() > x.shape[1] // OUTLIER_DIVISOR:
        return None
    # In float32 it is what is returned, so it is allocated before what is freed.
    scaled = x.new_empty(x.shape[0], codes.shape[0]) if x.dtype == torch.float32 else None
    with scope("temporary"):
        # Outliers are set to zero in tensors that are computed from x, not in a copy of x.
        row_scale = magnitudes.index_fill_(1, columns, 0).amax(dim=1, keepdim=True).float()
        del magnitudes
        row_scale = row_scale.clamp_min_(TINY).div_(127)
        row_codes = torch.div(x, row_scale).index_fill_(1, columns, 0).round_().to(torch.int8)
        counts = _ops.int8_linear_matmul(row_codes, codes)
        del row_codes
        scaled = torch.mul(counts, row_scale, out=scaled).mul_(scale)
        del counts
    y = scaled.to(x.dtype)
    if columns.numel():
        outliers = scaled_codes(codes[:, columns], scale, x.dtype)
        y.addmm_(x.index_select(1, columns), outliers.t())
    return y


def _outlier_columns(magnitudes: Tensor, threshold: float) -> Tensor:
    """Return the indices of the columns of |x| with a value above the threshold.

    On meta tensors: as many columns as the mixed product allows at most, an upper bound.
    """
    if threshold == 0:
        return torch.empty(0, dtype=torch.long, device=magnitudes.device)
    is_outlier = magnitudes.amax(dim=0) > threshold
    if magnitudes.is_meta:
        return torch.empty(is_outlier.shape[0] // OUTLIER_DIVISOR, dtype=torch.long, device="meta")
    return is_outlier.nonzero().flatten()
