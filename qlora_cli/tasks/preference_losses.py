"""The losses of preference training, as functions of the log-probabilities of two answers.

Letters: P pairs. In tensors of shape (P, 2) the first column is the chosen answer.

- dpo: -log sigmoid(m), m = beta ((c - c_ref) - (r - r_ref)), with the answers' log-probabilities c
  and r (Rafailov et al. 2023, equation 7). With label smoothing e it is
  -(1 - e) log sigmoid(m) - e log sigmoid(-m) (conservative DPO, Mitchell 2023).
- ipo: (m - 1 / (2 beta))^2, m = (c - c_ref) - (r - r_ref) (Azar et al. 2023, equation 17), with
  log-probabilities per token, as TRL computes it.
- simpo: -log sigmoid(beta (c - r) - gamma), with log-probabilities per token (Meng et al. 2024,
  equation 6).
- orpo: -c - beta log sigmoid(log odds(c) - log odds(r)), with log-probabilities per token and
  odds(p) = p / (1 - p) (Hong et al. 2024, equations 6 and 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora_cli.recipe.preference import Preference

_LARGEST_LOG_PROBABILITY = -1e-6
"""Log-probabilities per token are not above this in odds, which are infinite at probability 1."""


@dataclass(frozen=True)
class PairScores:
    """Loss and rewards of P pairs. loss: (P,). rewards: (P, 2), of the chosen and the rejected."""

    loss: Tensor
    rewards: Tensor

    def metric_sums(self) -> dict[str, Tensor]:
        """Return the sums over pairs of the metrics, without gradients.

        accuracy: 1 if the chosen answer has the higher reward. margin: difference of the rewards.
        """
        chosen, rejected = self.rewards.detach().unbind(dim=1)
        return {
            "accuracy": (chosen > rejected).float().sum(),
            "margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
        }


def pair_scores(
    settings: Preference, log_probs: Tensor, lengths: Tensor, reference: Tensor | None
) -> PairScores:
    """Return loss and rewards of each pair, differentiable in `log_probs`.

    settings: without `auto`. log_probs: (P, 2) float32, sum over the tokens of each answer.
    lengths: (P, 2) float32, their numbers of tokens. reference: (P, 2), `log_probs` under the
    reference model; None if the loss does not need it.
    """
    beta = settings.beta
    assert beta != "auto"
    if settings.loss == "dpo":
        assert reference is not None
        rewards = beta * (log_probs - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        swapped = settings.label_smoothing
        loss = -(1 - swapped) * logsigmoid(margin) - swapped * logsigmoid(-margin)
        return PairScores(loss, rewards)
    per_token = log_probs / lengths
    if settings.loss == "ipo":
        assert reference is not None
        ratios = per_token - reference / lengths
        loss = (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)).square()
        return PairScores(loss, beta * ratios)
    rewards = beta * per_token
    if settings.loss == "simpo":
        return PairScores(-logsigmoid(rewards[:, 0] - rewards[:, 1] - settings.gamma), rewards)
    log_odds = _log_odds(per_token)
    loss = -per_token[:, 0] - beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    return PairScores(loss, rewards)


def _log_odds(log_probs: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p."""
    bounded = log_probs.clamp(max=_LARGEST_LOG_PROBABILITY)
    return bounded - torch.log(-torch.expm1(bounded))
