"""Cross entropy over the vocabulary in chunks of tokens, never a tokens x vocabulary tensor.

For 2048 tokens of a 128k vocabulary the usual float32 logits take 3 GB; this takes the logits of
one chunk. The gradient of the hidden states is computed in the same pass, because the logits are
there. torch's own `linear_cross_entropy` returns a bfloat16 loss and copies the head to float32 on
CPU.

Letters: n positions, m of them with a target, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.scopes import scope

IGNORE_INDEX = -100
"""A label that is not trained on."""
_WORDS = 8192
"""Rows of the head whose gradient is added to at once."""
CHUNK_ELEMENTS = 2**25
"""Logits of one chunk: 128 MiB in float32. Half of it saves 96 MiB and reads the head twice."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """scale * sum of -log softmax(h W^T)[target]; gradients of h, and of W where it is trained."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, positions: Tensor, targets: Tensor, scale: float
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        with scope("loss"):
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
            grad_head = torch.zeros_like(head) if wants_head else None
            weight = head.to(hidden.dtype)
            for at, rows, logits in _chunks(hidden, weight, positions):
                chosen = targets[at][:, None]
                losses, probabilities = _losses(logits, chosen)
                total += losses.sum()
                if not (wants_hidden or wants_head):
                    continue
                # d loss / d logits = softmax - one_hot, scaled before it is rounded to 16 bit.
                probabilities.scatter_add_(
                    1, chosen, torch.full_like(chosen, -1, dtype=probabilities.dtype)
                )
                grad_logits = probabilities.mul_(scale).to(hidden.dtype)
                del logits, probabilities
                if grad_hidden is not None:
                    grad_hidden.index_copy_(0, positions[at], grad_logits @ weight)
                if grad_head is not None:
                    _add_product(grad_head, grad_logits.to(head.dtype), rows.to(head.dtype))
                del grad_logits, rows
        ctx.grads = (grad_hidden, grad_head)
        return total.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        scaled = (None if own is None else own.mul_(grad.to(own.dtype)) for own in grads)
        return (*scaled, None, None, None)


def _add_product(grad_head: Tensor, grad_logits: Tensor, rows: Tensor) -> None:
    """grad_head (V, d) += grad_logits (c, V)^T rows (c, d).

    Some words at a time: in bfloat16 a CPU's kernel copies what it adds to.
    """
    pieces = zip(grad_head.split(_WORDS), grad_logits.split(_WORDS, dim=1), strict=True)
    for own, of_words in pieces:
        own.addmm_(of_words.t(), rows)


def chunked_cross_entropy(
    hidden: Tensor, head: Tensor, positions: Tensor, targets: Tensor, scale: float
) -> Tensor:
    """scale * sum over targets of the cross entropy, float32, a scalar.

    hidden (n, d); head (V, d); positions (m,) int64, which rows of hidden have a target; targets
    (m,) int64. Backward may be called once. scale includes a loss scale where fp16 needs one, so
    that it is applied before gradients are rounded to 16 bit.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head, positions, targets, scale)
    return loss


@torch.no_grad()
def score(
    hidden: Tensor, head: Tensor, positions: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropy, targets that were the most likely token), both scalars."""
    with scope("loss"):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        right = torch.zeros((), dtype=torch.long, device=hidden.device)
        for at, _, logits in _chunks(hidden, head.to(hidden.dtype), positions):
            chosen = targets[at][:, None]
            right += (logits.argmax(dim=1, keepdim=True) == chosen).sum()
            total += _losses(logits, chosen)[0].sum()
            # Before the next chunk's logits are made, not when the name is bound anew.
            del logits
        return total, right


def _chunks(
    hidden: Tensor, weight: Tensor, positions: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which targets, their hidden states (c, d), their float32 logits (c, V)) chunk by chunk."""
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, positions.shape[0], size):
        at = slice(start, start + size)
        rows = hidden.index_select(0, positions[at])
        yield at, rows, (rows @ weight.t()).float()


def _losses(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(losses (c, 1), softmax (c, V)); overwrites the logits, which are not needed again."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    of_chosen = logits.gather(1, chosen)
    norm = logits.exp_().sum(dim=1, keepdim=True)
    return norm.log() - of_chosen, logits.div_(norm)
