"""64 greedy tokens: what the trained model would say, and how far the merged one says the same.

The trained model's tokens are asked of the merged one all at once: behind each of them it must
choose the next one. Up to the first difference this is what it would say itself, and no longer does
a token more need another pass over a model that is streamed.

A trained model that is held speaks with a cache of keys and values. One that is streamed cannot,
because each token would be a pass over the whole checkpoint. There a draft is put before it, the
row's own continuation: one pass gives its choice behind every position, all of it that the draft
had right is its own speech, and so is the first choice that differs; the choices are the next
draft. After `_PASSES` passes at least so many tokens are certain, and only these are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.export.compare.comparison_models import ComparisonModel
from qlora_cli.export.compare.logit_comparison import ComparedLogits
from qlora_cli.nn.loss import IGNORE_INDEX

NUM_TOKENS = 64
_PASSES = 3
"""On a CPU a pass packs the whole base again, at some 15 million weights a second and core."""
_WORDS = 2**14
"""Of the head, in float32 at once."""


@dataclass(frozen=True)
class GreedyAgreement:
    """Of `num_tokens` greedy tokens of the trained model the merged one says the first `agree`."""

    agree: int
    num_tokens: int


def greedy_continuation(model: ComparisonModel, rows: Sequence[Example]) -> Example:
    """A row that is the beginning of the first of `rows` and what the model says behind it.

    The beginning: up to its first trained token, or its first half where there is none before.
    """
    row = rows[0]
    first = next(at for at, label in enumerate(row.labels) if label != IGNORE_INDEX)
    prompt = row.ids[: first if first > 1 else max(1, len(row.ids) // 2)]
    limit = getattr(model.loaded.config, "max_position_embeddings", None)
    num = NUM_TOKENS if limit is None else max(0, min(NUM_TOKENS, limit - len(prompt)))
    draft = row.ids[len(prompt) :][:num]
    told = _spoken(model, prompt, num) if model.is_resident else _drafted(model, prompt, draft, num)
    return _row(prompt, told)


def count_agreeing_tokens(compared_logits: ComparedLogits) -> GreedyAgreement:
    """How far the merged model goes the same way. answers: its own to what was spoken."""
    same = (compared_logits.top1_tokens() == compared_logits.targets).tolist()
    return GreedyAgreement(_leading(same), len(same))


def _row(prompt: Sequence[int], told: Sequence[int]) -> Example:
    return Example([*prompt, *told], [IGNORE_INDEX] * len(prompt) + [*told], "greedy tokens")


@torch.no_grad()
def _spoken(model: ComparisonModel, prompt: Sequence[int], num: int) -> list[int]:
    """Token by token, with a cache."""
    backbone = model.loaded.model.get_submodule(model.loaded.family.backbone)
    given, cache, told = list(prompt), None, []
    for _ in range(num):
        ids = torch.tensor([given], device=model.device)
        said = backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        given = [_choice(model, said.last_hidden_state[0, -1:])]
        told += given
    return told


def _choice(model: ComparisonModel, hidden: Tensor) -> int:
    """Hidden (1, d)."""
    head: Any = model.loaded.head.weight
    logits = [hidden.float() @ words.float().t() for words in head.split(_WORDS)]
    return int(torch.cat(logits, dim=1).argmax())


def _drafted(
    model: ComparisonModel, prompt: Sequence[int], draft: Sequence[int], num: int
) -> Sequence[int]:
    """Draft by draft, a pass each."""
    # The row may be shorter than what is asked for; then any tokens do.
    told = [*draft, *[prompt[-1]] * num][:num]
    certain = 0
    for _ in range(_PASSES):
        choices = model.compared_logits([_row(prompt, told)]).top1_tokens().tolist()
        same = [choice == token for choice, token in zip(choices, told, strict=True)]
        certain = min(num, _leading(same) + 1)
        told = choices
        if certain == num:
            break
    return told[:certain]


def _leading(same: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((at for at, one in enumerate(same) if not one), len(same))
