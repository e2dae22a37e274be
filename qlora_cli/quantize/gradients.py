"""Gradients of the head's input (n, d), computed for a chunk of the vocabulary at a time.

Letters: n predicted positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_cli.export.compare.logit_comparison import ComparedLogits, RunningSoftmax


def sampled_gradient(logits: ComparedLogits, seed: int) -> Tensor:
    """Return the gradient of the sum of log p(y), with labels y drawn from the predictions p.

    The labels are those of the largest logit after Gumbel noise was added.
    """
    softmax = RunningSoftmax.empty(logits.targets)
    generator = torch.Generator(logits.targets.device).manual_seed(seed)
    best = torch.full(logits.targets.shape, -torch.inf, device=logits.targets.device)
    drawn = torch.zeros_like(logits.targets)
    for vocabulary, values in logits.logits():
        softmax.update(vocabulary, values)
        noise = torch.empty_like(values).exponential_(generator=generator).log_()
        largest, index = (values - noise).max(dim=1)
        drawn = torch.where(largest > best, index + vocabulary.start, drawn)
        best = torch.maximum(best, largest)
    normalizer = softmax.log_normalizer()[:, None]

    def of_logits(vocabulary: slice, values: Tensor) -> Tensor:
        gradient = (values - normalizer).exp().neg_().float()
        inside = (drawn >= vocabulary.start) & (drawn < vocabulary.stop)
        gradient[inside, drawn[inside] - vocabulary.start] += 1
        return gradient

    return _of_head_input(logits, of_logits)


def divergence_gradient(logits: ComparedLogits, reference: ComparedLogits) -> Tensor:
    """Return the gradient of the sum of KL(reference || logits) over the positions."""
    own, other = (RunningSoftmax.empty(logits.targets) for _ in range(2))
    for predicted, softmax in ((logits, own), (reference, other)):
        for vocabulary, values in predicted.logits():
            softmax.update(vocabulary, values)
    chunks = reference.logits()

    def of_logits(_: slice, values: Tensor) -> Tensor:
        _, wanted = next(chunks)
        probabilities = (values - own.log_normalizer()[:, None]).exp_()
        return (probabilities - (wanted - other.log_normalizer()[:, None]).exp_()).float()

    return _of_head_input(logits, of_logits)


def _of_head_input(logits: ComparedLogits, of_logits: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Return the gradient of the head's input.

    of_logits: maps a chunk of the vocabulary and its logits (n, c) to their gradient (n, c).
    """
    result = torch.zeros_like(logits.hidden_states, dtype=torch.float32)
    transform = logits.head.transform
    for vocabulary, values in logits.logits():
        gradient = of_logits(vocabulary, values)
        slope = transform.slope(values)
        if slope is not None:
            gradient.mul_(slope)
        rows = logits.head.rows(vocabulary).to(gradient.device)
        result.addmm_(gradient, rows, alpha=transform.scale)
    return result
