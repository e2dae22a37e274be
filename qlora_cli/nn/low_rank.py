"""The best approximation of a matrix by a product of two factors of low rank.

That is U_r S_r V_r^T of the singular value decomposition (Eckart and Young 1936). A full
decomposition of a large weight takes minutes on a CPU, so the leading left singular vectors come
from subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) in float32. The memory
tracker observes every operation of it, and beside the matrix itself only matrices with
rank + `_OVERSAMPLING` columns or rows exist. A rank close to the smaller side is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 10
_ITERATIONS = 8


def low_rank_factors(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (B, A) with B A close to the matrix and B^T B equal to A A^T.

    matrix: (out, in) float32 on the CPU, or on meta in a dry run; not modified. rank: at most the
    smaller side. seed: of the first subspace. B is (out, rank), A is (rank, in).
    """
    columns = min(rank + _OVERSAMPLING, *matrix.shape)
    start = torch.empty(matrix.shape[1], columns, device=matrix.device)
    if not start.is_meta:
        start.normal_(generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(matrix @ start).Q
    del start
    for _ in range(_ITERATIONS if columns < min(matrix.shape) else 0):
        other = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ other).Q
        del other
    projected = basis.t() @ matrix
    # In float64, because the singular values are the roots of these eigenvalues.
    precise = projected.double()
    squares, vectors = torch.linalg.eigh(precise @ precise.t())
    del precise
    vectors = vectors[:, -rank:].flip(1)
    roots = squares[-rank:].flip(0).clamp_min(0).sqrt().sqrt()
    scale = torch.where(roots > 0, 1 / roots, 0.0)
    b = basis @ (vectors * roots).float()
    a = (vectors * scale).float().t() @ projected
    return b, a
