"""Compare greedy generation: on how many of its first tokens the merged model agrees.

The trained model generates up to `NUM_TOKENS` tokens greedily after a prompt. The merged model
then processes the prompt and all these tokens in one forward pass. At each position its most likely
token is compared with the next generated one. Up to the first difference this equals what the
merged model would generate itself. So the merged model, which is streamed, needs one pass only.

A resident trained model generates token by token with a key-value cache. A streamed one would need
a pass over the complete checkpoint for each token, so it verifies a draft instead. The first draft
is the continuation in the row itself. One pass gives the model's most likely token at every
position. All tokens of the draft up to the first difference are what the model would generate, and
so is its own token at the first difference. The model's tokens are the next draft. After `_PASSES`
passes at least `_PASSES` tokens are certain, and only the certain ones are compared.
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
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.tasks.backbone import head_input_of

NUM_TOKENS = 64
_PASSES = 3
"""On a CPU a pass packs the complete base again, at some 15 million weights per second and core."""
_HEAD_ROWS = 2**14
"""Rows of the head in float32 at a time."""


@dataclass(frozen=True)
class GreedyAgreement:
    """The first `num_agreeing` of `num_tokens` greedy tokens are the same in both models."""

    num_agreeing: int
    num_tokens: int


def greedy_continuation(trained: ComparisonModel, rows: Sequence[Example]) -> Example:
    """Return a row that consists of a prompt and the trained model's greedy continuation.

    The labels of the continuation are its tokens; the prompt has no labels. The prompt is the first
    row up to its first trained token, or the first half of that row if it begins with one.

    trained: the trained model. rows: rows with labels; only the first is used.
    """
    row = rows[0]
    first = next(index for index, label in enumerate(row.labels) if label != IGNORE_INDEX)
    prompt = row.ids[: first if first > 1 else max(1, len(row.ids) // 2)]
    limit = trained.loaded.num_positions
    num = NUM_TOKENS if limit is None else max(0, min(NUM_TOKENS, limit - len(prompt)))
    if trained.is_resident:
        return _labelled(prompt, _generate(trained, prompt, num))
    draft = row.ids[len(prompt) :][:num]
    return _labelled(prompt, _verify_drafts(trained, prompt, draft, num))


def count_agreeing_tokens(merged: ComparedLogits) -> GreedyAgreement:
    """Return on how many leading tokens of the greedy continuation the merged model agrees.

    merged: the merged model's predictions on the row that `greedy_continuation` returned.
    """
    is_same = (merged.top1_tokens() == merged.targets).tolist()
    return GreedyAgreement(_num_leading(is_same), len(is_same))


def _labelled(prompt: Sequence[int], continuation: Sequence[int]) -> Example:
    labels = [IGNORE_INDEX] * len(prompt) + [*continuation]
    return Example([*prompt, *continuation], labels, "greedy tokens")


@torch.no_grad()
def _generate(trained: ComparisonModel, prompt: Sequence[int], num: int) -> list[int]:
    """Generate `num` tokens greedily, one by one, with a key-value cache."""
    backbone = trained.loaded.model.get_submodule(trained.loaded.family.backbone)
    inputs, cache, generated = list(prompt), None, []
    for _ in range(num):
        ids = torch.tensor([inputs], device=trained.device)
        output = backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        inputs = [
            _top1_token(trained, head_input_of(trained.loaded, output.last_hidden_state[0, -1:]))
        ]
        generated += inputs
    return generated


def _top1_token(trained: ComparisonModel, hidden: Tensor) -> int:
    """Return the most likely token. hidden: (1, d), the final hidden state at one position."""
    head: Any = trained.loaded.head
    outputs = [hidden.float() @ rows.float().t() for rows in head.weight.split(_HEAD_ROWS)]
    output = torch.cat(outputs, dim=1)
    if head.bias is not None:
        output += head.bias
    return int(trained.loaded.family.logits.apply_(output).argmax())


def _verify_drafts(
    trained: ComparisonModel, prompt: Sequence[int], draft: Sequence[int], num: int
) -> Sequence[int]:
    """Return the greedy tokens, at most `num`, that are certain after `_PASSES` passes."""
    # The row may be shorter than the continuation; any tokens can complete the draft.
    tokens = [*draft, *[prompt[-1]] * num][:num]
    num_certain = 0
    for _ in range(_PASSES):
        top1 = trained.compared_logits([_labelled(prompt, tokens)]).top1_tokens().tolist()
        is_same = [choice == token for choice, token in zip(top1, tokens, strict=True)]
        num_certain = min(num, _num_leading(is_same) + 1)
        tokens = top1
        if num_certain == num:
            break
    return tokens[:num_certain]


def _num_leading(is_same: Sequence[bool]) -> int:
    """Return the number of True values before the first False."""
    return next((index for index, same in enumerate(is_same) if not same), len(is_same))
