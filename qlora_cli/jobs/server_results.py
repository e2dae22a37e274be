"""The result of `qlora verify --server`. Imports no torch, because `ui/` imports it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class PredictionChange(Result):
    """How much rounding the merged model to `bits` bits per weight changes its predictions.

    mean_gap, mean_logprob_difference: as in `ServerResult`.
    """

    bits: int
    mean_gap: float
    mean_logprob_difference: float | None


@dataclass(frozen=True)
class ServerResult(Result):
    """Result of `qlora verify --server`.

    model: its name on the server. texts, chats: number of prompts that were sent as text and as
    chat. same_texts, same_chats: number of equal answers. mean_gap: mean number of nats by which a
    token of the server is less likely than the merged model's top-1 token; None if the server
    reads other prompts. mean_logprob_difference: mean difference of the tokens' log-probabilities;
    None also if the server does not report them. rounding: the same figures for roundings of the
    merged model; empty if the answers are so close that they are not needed. faults: the causes of
    differences that are not allowed, one line each. explanation: further sentences.
    """

    passed: bool
    server: str
    model: str
    texts: int
    same_texts: int
    chats: int
    same_chats: int
    mean_gap: float | None
    mean_logprob_difference: float | None
    rounding: tuple[PredictionChange, ...]
    faults: tuple[str, ...]
    explanation: tuple[str, ...] = ()
