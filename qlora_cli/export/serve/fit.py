"""How well a model and prompts explain the answers of a server.

The merged model with its own prompts is one explanation. The base without the adapter and other
prompts are others. An explanation is right if the server's answers are its greedy answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qlora_cli.export.serve.answer_path import AnswerPath, Penalty, answer_path
from qlora_cli.export.serve.client import Answer
from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.export.serve.prompts import Prompt

NUM_TOKENS = 24
"""Largest number of tokens of an answer."""
_TIMES_BETTER = 2
"""An explanation is better if it leaves at most the inverse of this part of the differences."""
CLOSE = 0.02
"""Mean gap and mean difference in nats per token below which no other explanation is needed."""
_NOISE = 0.002
"""Mean difference of log-probabilities in nats that the order of additions causes."""


@dataclass(frozen=True)
class Exchange:
    """A prompt that was sent, and the server's answer."""

    prompt: Prompt
    answer: Answer

    @property
    def is_other_prompt(self) -> bool:
        """Return whether the server counts another number of tokens in the prompt."""
        return self.answer.prompt_tokens not in (None, len(self.prompt.ids))


@dataclass(frozen=True)
class Fit:
    """The answers as a model follows them, one path per answer, and the log-probabilities.

    log_prob_differences: of all tokens whose log-probability the server reports, in nats.
    """

    paths: tuple[AnswerPath, ...]
    log_prob_differences: tuple[float, ...]

    @property
    def num_greedy(self) -> int:
        """Return how many answers are the model's own greedy answers."""
        return sum(path.is_greedy for path in self.paths)

    @property
    def mean_gap(self) -> float:
        """Return by how many nats a token is less likely than the top-1 token; 0 if none is."""
        gaps = [gap for path in self.paths for gap in path.gaps]
        return fmean(gaps) if gaps else 0.0

    @property
    def mean_difference(self) -> float | None:
        """Return the mean difference of log-probabilities; None if the server reports none."""
        return fmean(self.log_prob_differences) if self.log_prob_differences else None

    @property
    def is_exact(self) -> bool:
        """Return whether the answers are the model's own, up to the order of additions."""
        return self.num_greedy == len(self.paths) and not (self.mean_difference or 0) > _NOISE

    @property
    def is_close(self) -> bool:
        """Return whether the answers are so near to the model's own that no cause is needed."""
        return self.mean_gap < CLOSE and not (self.mean_difference or 0) >= CLOSE

    def explains_better_than(self, other: Fit, *, by_gaps: bool = False) -> bool:
        """Return whether this explanation is clearly better, so that the other one is wrong.

        The log-probabilities decide if the server reports them, because they differ at every token.

        by_gaps: decide without them, for explanations that differ only in what is chosen.
        """
        ours, theirs = self.mean_difference, other.mean_difference
        if self.mean_gap > other.mean_gap:
            return False
        if ours is not None and theirs is not None and not by_gaps:
            return theirs > _NOISE and _TIMES_BETTER * ours < theirs
        return (
            other.mean_gap >= CLOSE
            and _TIMES_BETTER * self.mean_gap < other.mean_gap
            and self.num_greedy >= other.num_greedy
        )

    @classmethod
    def joined(cls, fits: Sequence[Fit]) -> Fit:
        """Return the fits of several groups of answers as one."""
        return cls(
            tuple(path for part in fits for path in part.paths),
            tuple(value for part in fits for value in part.log_prob_differences),
        )


def fit(
    model: LocalModel,
    exchanges: Sequence[Exchange],
    prompts: Sequence[list[int]] | None = None,
    penalty: Penalty | None = None,
) -> Fit:
    """Return how well a model explains answers.

    prompts: the tokens of each prompt; None for those that the model should read. penalty: that the
    server applies.
    """
    own = [exchange.prompt.ids for exchange in exchanges] if prompts is None else prompts
    paths = [
        answer_path(model, ids, exchange.answer, NUM_TOKENS, penalty)
        for ids, exchange in zip(own, exchanges, strict=True)
    ]
    differences = [
        abs(found - value)
        for path, exchange in zip(paths, exchanges, strict=True)
        if path.is_complete and len(exchange.answer.logprobs) >= len(path.ids)
        for found, value in zip(path.log_probs, exchange.answer.logprobs, strict=False)
        if math.isfinite(value)
    ]
    return Fit(tuple(paths), tuple(differences))
