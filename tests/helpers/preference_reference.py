"""The published preference losses on complete logits, written independently of the package.

Each formula is copied from its paper and computed in plain torch, one answer at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.spans import Spans, use_spans


def answer_log_prob(loaded: LoadedModel, answer: Example) -> tuple[Tensor, int]:
    """Return log p(answer | prompt) from complete logits, and the answer's number of tokens."""
    ids = torch.tensor([answer.ids])
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    positions = torch.arange(len(answer.ids))[None]
    spans = Spans.on((len(answer.ids),), torch.device("cpu"), loaded.kernel)
    with use_spans(spans):
        output = backbone(input_ids=ids, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state[0]
    log_probs = (hidden.float() @ loaded.head.weight.float().t()).log_softmax(-1)
    total, number = torch.zeros(()), 0
    for place, label in enumerate(answer.labels):
        if place > 0 and label != -100:
            total, number = total + log_probs[place - 1, label], number + 1
    return total, number


def published_loss(
    name: str,
    chosen: tuple[Tensor, int],
    rejected: tuple[Tensor, int],
    reference: tuple[float, float],
    beta: float,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    """Return the loss of one pair.

    chosen, rejected: log-probability and number of tokens. reference: the log-probabilities of both
    under the reference model.
    """
    (c, num_c), (r, num_r) = chosen, rejected
    if name == "dpo":
        m = beta * ((c - reference[0]) - (r - reference[1]))
        return -(1 - smoothing) * torch.sigmoid(m).log() - smoothing * torch.sigmoid(-m).log()
    mean_c, mean_r = c / num_c, r / num_r
    if name == "ipo":
        h = (mean_c - reference[0] / num_c) - (mean_r - reference[1] / num_r)
        return (h - 1 / (2 * beta)) ** 2
    if name == "simpo":
        return -torch.sigmoid(beta * mean_c - beta * mean_r - gamma).log()
    odds_c, odds_r = (mean.exp() / (1 - mean.exp()) for mean in (mean_c, mean_r))
    return -mean_c - beta * torch.sigmoid((odds_c / odds_r).log()).log()
