"""How far one model's answers are from another's, on the same rows.

Of each model the last hidden states are kept, and its head, so that two models need never be in
memory together and no tokens x vocabulary tensor is made: logits come chunk by chunk.

Letters: n positions compared, d hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.chat import UNTRAINED, Example

_CHUNK_ELEMENTS = 2**22
"""Logits of one chunk: 16 MiB in float32; a comparison holds ten times that."""


@dataclass(frozen=True)
class Answers:
    """What a model says at every position with a trained token behind it, on the host.

    hidden (n, d); head (V, d); targets (n,) int64, the tokens that follow.
    """

    hidden: Tensor
    head: Tensor
    targets: Tensor

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(positions, their logits (c, V) in float32), chunk by chunk."""
        step = max(1, _CHUNK_ELEMENTS // self.head.shape[0])
        head = self.head.float()
        for start in range(0, self.hidden.shape[0], step):
            at = slice(start, start + step)
            yield at, self.hidden[at].float() @ head.t()


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference, over n positions.

    max_logit_difference: the largest |difference| of any logit. mean_kl: KL(reference ||
    candidate) in nats. top1_agreement: share of positions with the same most likely token. loss:
    the candidate's mean nats on the tokens that follow.
    """

    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def answers(backbone: Any, head: nn.Module, rows: Sequence[Example]) -> Answers:
    """Runs each row alone, as a person would ask it. backbone: ids (1, T) -> hidden (1, T, d)."""
    weight: Any = head.weight
    hidden, targets = [], []
    for row in rows:
        ids = torch.tensor([row.ids], device=weight.device)
        states = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        labels = torch.tensor(row.labels)[1:]
        at = (labels != UNTRAINED).nonzero().flatten()
        hidden.append(states[:-1][at.to(states.device)].cpu())
        targets.append(labels[at])
    return Answers(torch.cat(hidden), weight.detach().cpu(), torch.cat(targets))


def compare(reference: Answers, candidate: Answers) -> Comparison:
    """Raises AssertionError where they did not answer the same rows over the same vocabulary."""
    assert torch.equal(reference.targets, candidate.targets)
    assert reference.head.shape[0] == candidate.head.shape[0]
    most, divergence, same, loss = 0.0, 0.0, 0, 0.0
    for (at, ours), (_, theirs) in zip(reference.logits(), candidate.logits(), strict=True):
        # A NaN must not be passed over, and max() would.
        most = float(torch.tensor([most, (ours - theirs).abs().max().item()]).max())
        same += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
        log_p, log_q = ours.double().log_softmax(dim=1), theirs.double().log_softmax(dim=1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        loss -= float(log_q.gather(1, candidate.targets[at][:, None]).sum())
    num = reference.targets.numel()
    return Comparison(most, divergence / num, same / num, loss / num)


def free_memory() -> None:
    """After dropping a model: its modules refer to each other, so only the collector frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
