"""The cross entropy of `loss.py` for a head that is copied to the device in pieces.

Every piece is copied once per call, so all targets are multiplied by it before the next one. The
softmax over the vocabulary is computed online: for each target the largest logit and the sum of
exp(logit - largest) over the pieces so far. The gradient of the hidden states is the weighted sum
of the head's rows; the weights of earlier pieces are corrected when later ones change the largest
logit and the sum, as FlashAttention does (Dao et al. 2022, algorithm 1). Sums over pieces are in
float32, so results differ from those of a head on the device by rounding only.

The row of the target has the weight softmax - 1. It is added in float32 at the end: next to other
weights, a softmax that was rounded to 16 bit would leave nothing of a difference close to 0.

Letters: m targets, c of them in a chunk, d hidden size, V vocabulary, v vocabulary of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.scopes import mark, scope
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.logits import LogitTransform


class _OnlineSoftmax:
    """The softmax of m targets over the pieces so far. Every tensor has the shape (m, 1).

    largest: largest logit. norm: sum of exp(logit - largest). target: logit of the target. top1:
    token of the largest logit, int64.
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets[:, None]
        zeros = torch.zeros(self.targets.shape, dtype=torch.float32, device=targets.device)
        self.largest = zeros - math.inf
        self.norm = zeros
        self.target = torch.zeros_like(zeros)
        self.top1 = torch.zeros_like(self.targets)

    def update(self, at: slice, start: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the logits (c, v) of a piece, and overwrite them by exp(logit - largest).

        at: the chunk of targets. start: first token of the piece. Returns (earlier share of the
        sum, column of each target in the piece, whether it is in the piece), all (c, 1).
        """
        column = self.targets[at] - start
        is_inside = (column >= 0) & (column < logits.shape[1])
        column = column.clamp_(0, logits.shape[1] - 1)
        self.target[at] = torch.where(is_inside, logits.gather(1, column), self.target[at])
        largest, index = logits.max(dim=1, keepdim=True)
        self.top1[at] = torch.where(largest > self.largest[at], index + start, self.top1[at])
        largest = torch.maximum(largest, self.largest[at])
        earlier = self.norm[at] * (self.largest[at] - largest).exp_()
        norm = earlier + logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        self.largest[at], self.norm[at] = largest, norm
        return earlier.div_(norm), column, is_inside

    def losses(self) -> Tensor:
        """Return -log softmax of each target after the last piece, (m, 1)."""
        return self.norm.log() - (self.target - self.largest)

    def target_probabilities(self) -> Tensor:
        """Return the softmax of each target after the last piece, (m, 1)."""
        return (self.target - self.largest).exp_().div_(self.norm)


class _Gradient:
    """The gradient of the hidden states of m targets, in float32, while pieces are added.

    rows: hidden states (m, d). weights: (m, 1) or a number, factor of each target's loss.
    transform: of the head's output.
    """

    def __init__(self, rows: Tensor, weights: Tensor | float, transform: LogitTransform) -> None:
        self._total = torch.zeros_like(rows, dtype=torch.float32)
        self._target_rows = torch.zeros_like(rows)
        self._weights = weights * transform.scale
        self._slopes: Tensor | None = None
        if transform.cap is not None:
            self._slopes = torch.zeros_like(self._total[:, :1])

    def add(
        self,
        at: slice,
        piece: Tensor,
        softmax: tuple[Tensor, Tensor],
        found: tuple[Tensor, Tensor, Tensor],
        slope: Tensor | None,
    ) -> None:
        """Add a piece (v, d) for a chunk of targets.

        softmax: exp(logit - largest) (c, v), which is overwritten, and their sum (c, 1). found: of
        `_OnlineSoftmax.update`. slope: (c, v), of the logits, or None for 1.
        """
        (values, norm), (earlier, column, is_inside) = softmax, found
        # The target's own weight is added by `result`.
        values.scatter_(1, column, values.gather(1, column).masked_fill_(is_inside, 0))
        values.div_(norm)
        if slope is not None and self._slopes is not None:
            values.mul_(slope)
            own = torch.where(is_inside, slope.gather(1, column), self._slopes[at])
            self._slopes[at] = own
        weights = self._weights
        values.mul_(weights[at] if isinstance(weights, Tensor) else weights)
        total, grad_output = self._total[at].mul_(earlier), values.to(piece.dtype)
        if piece.dtype == torch.float32:
            total.addmm_(grad_output, piece)
        else:
            total.add_(grad_output @ piece)
        own_rows = self._target_rows[at]
        own_rows.copy_(torch.where(is_inside, piece.index_select(0, column.squeeze(1)), own_rows))

    def result(self, probabilities: Tensor) -> Tensor:
        """Return the gradient (m, d) in the dtype of the hidden states.

        probabilities: of `_OnlineSoftmax.target_probabilities`, which are overwritten.
        """
        factors = probabilities.sub_(1).mul_(self._weights)
        if self._slopes is not None:
            factors.mul_(self._slopes)
        return self._total.addcmul_(self._target_rows, factors).to(self._target_rows.dtype)


class _PiecewiseCrossEntropy(torch.autograd.Function):
    """Sum of scale * -log softmax(logits)[target], with the gradient of h."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: HostHead,
        positions: Tensor,
        targets: Tensor,
        scale: float | Tensor,
        transform: LogitTransform,
        num_logits: int,
    ) -> Tensor:
        mark("loss")
        with scope("loss"):
            rows = hidden.index_select(0, positions)
            softmax = _OnlineSoftmax(targets)
            weights = scale[:, None] if isinstance(scale, Tensor) else scale
            grad = _Gradient(rows, weights, transform) if ctx.needs_input_grad[0] else None
            for at, vocabulary, piece, logits in _logits(rows, head, transform, num_logits):
                slope = transform.slope(logits) if grad is not None else None
                found = softmax.update(at, vocabulary.start, logits)
                if grad is not None:
                    grad.add(at, piece, (logits, softmax.norm[at]), found, slope)
                del piece, logits, slope, found
            losses = softmax.losses()
            ctx.grad = None
            if grad is not None:
                own = grad.result(softmax.target_probabilities())
                ctx.grad = torch.zeros_like(hidden).index_copy_(0, positions, own)
            # One scale for all is applied to the sum, which is one rounding instead of many.
            if isinstance(weights, Tensor):
                return losses.mul_(weights).sum()
            return losses.sum().mul_(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, ctx.grad = ctx.grad, None
        scaled = None if own is None else own.mul_(grad.to(own.dtype))
        return (scaled, None, None, None, None, None, None)


def piecewise_cross_entropy(
    hidden: Tensor,
    head: HostHead,
    positions: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    transform: LogitTransform,
    num_logits: int,
) -> Tensor:
    """Return what `chunked_cross_entropy` returns, for a head with several pieces.

    num_logits: logits that exist at once. The other arguments are those of that function.
    """
    loss: Tensor = _PiecewiseCrossEntropy.apply(
        hidden, head, positions, targets, scale, transform, num_logits
    )
    return loss


@torch.no_grad()
def piecewise_scores(
    hidden: Tensor,
    head: HostHead,
    positions: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    num_logits: int,
) -> tuple[Tensor, Tensor]:
    """Return (whether each target is top-1, its loss), both (m, 1).

    The arguments are those of `piecewise_cross_entropy`.
    """
    mark("loss")
    rows = hidden.index_select(0, positions)
    softmax = _OnlineSoftmax(targets)
    for at, vocabulary, _, logits in _logits(rows, head, transform, num_logits):
        softmax.update(at, vocabulary.start, logits)
        del logits
    return softmax.top1 == softmax.targets, softmax.losses()


def _logits(
    rows: Tensor, head: HostHead, transform: LogitTransform, num_logits: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield (chunk of targets, vocabulary of a piece, piece (v, d), float32 logits (c, v)).

    rows: hidden states (m, d). The logits of each chunk are the caller's alone.
    """
    size = max(1, num_logits // head.piece_rows)
    for vocabulary, piece in head.pieces():
        for start in range(0, rows.shape[0], size):
            at = slice(start, min(start + size, rows.shape[0]))
            output = rows[at] @ piece.t()
            if head.bias is not None:
                output += head.bias[vocabulary]
            converted = [transform.apply_(output.float())]
            del output
            yield at, vocabulary, piece, converted.pop()
        del piece
