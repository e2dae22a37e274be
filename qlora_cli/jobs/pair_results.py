"""The result of `qlora eval` for a run of `task: preference`."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class PairEvalResult(Result):
    """Mean values over pairs.

    loss: the recipe's preference loss. pairs: their number. accuracy: share of pairs whose chosen
    answer has the higher reward. margin: difference of the rewards.
    """

    loss: float
    pairs: int
    accuracy: float
    margin: float
    reward_chosen: float
    reward_rejected: float
