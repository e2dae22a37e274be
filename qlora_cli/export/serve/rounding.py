"""Round the local model's weights, to measure how much a quantization changes its predictions.

The same rounding changes a small model more than a large one, so no fixed limit is right for all.
The weights are rounded in blocks, as GGUF files have them. The rounded model computes in bfloat16,
the least exact format of servers; that alone can change predictions more than 8-bit weights do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qlora_cli.export.serve.local_model import LocalModel

Bits = Literal[8, 4]
"""Bits per weight of a quantization."""
_BLOCK = 32
"""Weights that share one scale."""


@dataclass(frozen=True)
class Change:
    """How much predictions differ from the local model's, over the tokens of greedy answers.

    mean_gap: nats by which a token is less likely than the top-1 token. mean_difference: of the
    tokens' log-probabilities, in nats; None if they are not known.
    """

    mean_gap: float
    mean_difference: float | None


@torch.no_grad()
def changes_by_rounding(
    model: LocalModel, answers: Sequence[tuple[list[int], list[int]]]
) -> dict[Bits, Change]:
    """Return the change by rounding to 8 and to 4 bits. The model is changed.

    answers: prompts and the local model's answers, as tokens.
    """
    wanted = [_log_probs(model, *answer) for answer in answers]
    changes: dict[Bits, Change] = {}
    model.model.to(torch.bfloat16)
    for bits in get_args(Bits):
        for weight in model.model.parameters():
            if weight.ndim == 2:
                weight.copy_(_rounded(weight.float(), bits))
        found = [_log_probs(model, *answer) for answer in answers]
        changes[bits] = _change(wanted, found, [ids for _, ids in answers])
    return changes


def _log_probs(model: LocalModel, prompt: list[int], ids: list[int]) -> Tensor:
    """Return the log-probabilities (T, V) at the positions that predict T tokens of an answer."""
    logits = model.logits([*prompt, *ids])[len(prompt) - 1 : -1]
    log_probs: Tensor = logits.log_softmax(-1)
    return log_probs


def _change(wanted: Sequence[Tensor], found: Sequence[Tensor], ids: Sequence[list[int]]) -> Change:
    chosen = torch.tensor([token for row in ids for token in row]).unsqueeze(-1)
    own, other = torch.cat(list(wanted)), torch.cat(list(found))
    gaps = other.amax(-1) - other.gather(-1, chosen)[:, 0]
    differences = (own - other).gather(-1, chosen).abs()
    return Change(float(gaps.mean()), float(differences.mean()))


def _rounded(weight: Tensor, bits: Bits) -> Tensor:
    """Return a weight rounded to this many bits per value, symmetrically in each block."""
    flat = weight.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % _BLOCK)]).view(-1, _BLOCK)
    step = padded.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (padded / step.clamp_min(torch.finfo(step.dtype).tiny)).round() * step
    return rounded.flatten()[: len(flat)].view_as(weight)
