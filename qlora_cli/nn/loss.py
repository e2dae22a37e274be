"""Cross entropy over the vocabulary in chunks of tokens, without a tokens x vocabulary tensor.

For 2048 tokens of a 128k vocabulary the usual float32 logits take 3 GB; this needs the logits of
one chunk. The forward pass also computes the gradient of the hidden states, because the logits
exist then. torch's own `linear_cross_entropy` returns a bfloat16 loss and copies the head to
float32 on a CPU.

Letters: n positions, m of them with a target, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.scopes import mark, represents, scope
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.logits import IDENTITY, LogitTransform
from qlora_cli.nn.piecewise_loss import piecewise_cross_entropy, piecewise_scores

_HEAD_ROWS = 8192
"""Rows of the head whose gradient is updated at once."""
_CONVERTED_ELEMENTS = 2**18
"""Values of the head that are converted to another dtype at once: 1 MiB in float32, which stays in
a CPU's cache until the product has read it (docs/performance.md)."""
CHUNK_ELEMENTS = 2**25
"""Logits of one chunk if its number of tokens is not given: 128 MiB in float32."""
_CHUNKS_ON_META = 4
"""Complete chunks that a dry run computes; the others need the same memory again."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of scale * -log softmax(logits)[target].

    Gradients of h, and of the head's weight and bias if they are trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        scale: float | Tensor,
        transform: LogitTransform,
        chunk: int | None,
    ) -> Tensor:
        mark("loss")
        with scope("loss"):
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            inputs = zip((hidden, head, bias), ctx.needs_input_grad, strict=False)
            ctx.grads = [
                torch.zeros_like(tensor) if tensor is not None and needed else None
                for tensor, needed in inputs
            ]
            for at, rows, logits in _chunks(hidden, head, bias, positions, transform, chunk):
                chosen = targets[at][:, None]
                needs_grad = any(grad is not None for grad in ctx.grads)
                slope = transform.slope(logits) if needs_grad else None
                losses, probabilities = _losses(logits, chosen)
                weights = scale[at, None] if isinstance(scale, Tensor) else scale
                # One scale for all is applied to the sum, which is one rounding instead of many.
                total += (losses * weights if isinstance(weights, Tensor) else losses).sum()
                if not needs_grad:
                    continue
                # d loss / d logits = softmax - one_hot, scaled before it is rounded to 16 bit.
                probabilities.scatter_add_(
                    1, chosen, torch.full_like(chosen, -1, dtype=probabilities.dtype)
                )
                if slope is not None:
                    probabilities.mul_(slope)
                grad_output = probabilities.mul_(weights * transform.scale).to(hidden.dtype)
                del logits, probabilities, slope
                _add_gradients(ctx.grads, grad_output, rows, head, positions[at])
                del grad_output, rows
        return total if isinstance(scale, Tensor) else total.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        scaled = (None if saved is None else saved.mul_(grad.to(saved.dtype)) for saved in grads)
        return (*scaled, None, None, None, None, None)


def _add_gradients(
    grads: Sequence[Tensor | None], grad_output: Tensor, rows: Tensor, weight: Tensor, at: Tensor
) -> None:
    """Add one chunk to the gradients of h, of the head's weight and of its bias.

    grad_output: gradient (c, V) of the head's output. rows: its input (c, d). weight: (V, d).
    at: (c,), the chunk's positions.
    """
    grad_hidden, grad_head, grad_bias = grads
    if grad_hidden is not None:
        grad_hidden.index_copy_(0, at, _grad_rows(grad_output, weight))
    if grad_head is not None:
        _add_product(grad_head, grad_output.to(grad_head.dtype), rows.to(grad_head.dtype))
    if grad_bias is not None:
        grad_bias += grad_output.sum(dim=0)


def _grad_rows(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return grad_output (c, V) W (V, d), the gradient of the head's input."""
    if weight.dtype == grad_output.dtype:
        return grad_output @ weight
    grad = grad_output.new_zeros(grad_output.shape[0], weight.shape[1])
    for at, piece in _converted(weight, grad.dtype):
        grad.addmm_(grad_output[:, at], piece)
    return grad


def _converted(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, these rows of the weight (V, d) in another dtype), a few at a time.

    A copy of the head can need more memory than everything else in a step.
    """
    step = max(1, _CONVERTED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        at = slice(start, start + step)
        yield at, weight[at].to(dtype)


def _add_product(grad_head: Tensor, grad_logits: Tensor, rows: Tensor) -> None:
    """grad_head (V, d) += grad_logits (c, V)^T rows (c, d).

    In pieces of _HEAD_ROWS, because a CPU's bfloat16 kernel copies the tensor that it adds to.
    """
    pieces = zip(grad_head.split(_HEAD_ROWS), grad_logits.split(_HEAD_ROWS, dim=1), strict=True)
    for grad_piece, logits_piece in pieces:
        grad_piece.addmm_(logits_piece.t(), rows)


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor | HostHead,
    positions: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
) -> Tensor:
    """Return the sum of the cross entropies of all targets times `scale`, a float32 scalar.

    hidden: (n, d). head: (V, d), or one in host memory. positions: (m,) int64, the rows of `hidden`
    that have a target. targets: (m,) int64. scale: one for all targets, or (m,) float32 one for
    each; it includes the loss scale of float16 training, so that it is applied before gradients are
    rounded to 16 bit. bias: (V,) of the head. transform: of the head's output. chunk: number of
    targets whose logits exist at once; None for as many as have CHUNK_ELEMENTS logits. With a head
    in pieces, as many logits exist, of more targets and a part of the vocabulary. `backward` can be
    called once.
    """
    if isinstance(head, HostHead):
        if head.num_pieces > 1:
            given = (hidden, head, positions, targets, scale, transform)
            return piecewise_cross_entropy(*given, _num_logits(head, chunk))
        head = head.whole()
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, head, bias, positions, targets, scale, transform, chunk
    )
    return loss


@torch.no_grad()
def score(
    hidden: Tensor,
    head: Tensor | HostHead,
    positions: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (sum of the cross entropies, number of targets that are the top-1 token), scalars.

    The arguments are those of `chunked_cross_entropy`.
    """
    with scope("loss"):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        for is_top1, losses in _scored_chunks(
            hidden, head, positions, targets, bias, transform, chunk
        ):
            correct += is_top1.sum()
            total += losses.sum()
        return total, correct


@torch.no_grad()
def score_targets(
    hidden: Tensor,
    head: Tensor | HostHead,
    positions: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target (m,) float32, and whether it is top-1 (m,) bool.

    The arguments are those of `chunked_cross_entropy`; there is at least one target.
    """
    chunks = list(_scored_chunks(hidden, head, positions, targets, bias, transform, chunk, True))
    is_top1, losses = (torch.cat(parts).squeeze(1) for parts in zip(*chunks, strict=True))
    return -losses, is_top1


def _scored_chunks(
    hidden: Tensor,
    head: Tensor | HostHead,
    positions: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    chunk: int | None,
    keeps: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (whether each target is top-1 (c, 1), losses (c, 1)) per chunk. keeps: as `_chunks`."""
    if isinstance(head, HostHead):
        if head.num_pieces > 1:
            num_logits = _num_logits(head, chunk)
            yield piecewise_scores(hidden, head, positions, targets, transform, num_logits)
            return
        head = head.whole()
    mark("loss")
    for at, _, logits in _chunks(hidden, head, bias, positions, transform, chunk, keeps):
        chosen = targets[at][:, None]
        is_top1 = logits.argmax(dim=1, keepdim=True) == chosen
        yield is_top1, _losses(logits, chosen)[0]
        # Free them before the next chunk's logits are computed.
        del logits


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    transform: LogitTransform,
    chunk: int | None,
    keeps: bool = False,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of the targets, their hidden states (c, d), float32 logits (c, V)) per chunk.

    keeps: whether the caller keeps a tensor of each chunk. If not, a dry run computes a few of many
    chunks of one size, whose work counts for all.
    """
    size = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    num_targets = positions.shape[0]
    num_full = num_targets // size
    num_run = num_full if keeps or not hidden.is_meta else _num_run(num_full)
    starts = [*range(0, num_run * size, size), *range(num_full * size, num_targets, size)]
    for number, start in enumerate(starts, 1):
        at = slice(start, start + size)
        with represents(1 + num_full - num_run if number == num_run else 1):
            rows = hidden.index_select(0, positions[at])
            yield at, rows, transform.apply_(head_output(rows, weight, bias).float())


def _num_run(num_full: int) -> int:
    """Return how many of the complete chunks a dry run computes.

    A small tensor of a chunk lives until the next one has its own, so the places of two chunks in
    the allocator's memory take turns. The last chunk is of the same turn as without a dry run.
    """
    return min(num_full, _CHUNKS_ON_META + num_full % 2)


def _num_logits(head: HostHead, chunk: int | None) -> int:
    """Return the logits that exist at once. chunk: as of `chunked_cross_entropy`."""
    return CHUNK_ELEMENTS if chunk is None else chunk * head.out_features


def head_output(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows W^T + b (c, V) of hidden states (c, d)."""
    if weight.dtype != rows.dtype:
        output = rows.new_empty(rows.shape[0], weight.shape[0])
        for at, piece in _converted(weight, rows.dtype):
            torch.mm(rows, piece.t(), out=output[:, at])
        return output if bias is None else output.add_(bias)
    if bias is None:
        return rows @ weight.t()
    return torch.addmm(bias.to(rows.dtype), rows, weight.t())


def _losses(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (losses (c, 1), softmax (c, V)). Overwrites the logits."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, chosen)
    norm = logits.exp_().sum(dim=1, keepdim=True)
    return norm.log() - target_logits, logits.div_(norm)
