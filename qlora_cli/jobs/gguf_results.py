"""The result of `qlora verify --gguf`. Imports no torch, because `ui/` imports it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class GgufFileResult(Result):
    """How one GGUF file compares with the merged folder.

    type: such as Q4_K_M. bytes: size of the file. mean_kl: mean KL(merged || file) in nats per
    token. answers, same_answers: number of greedy answers, and of equal ones. faults: failed
    checks.
    """

    file: str
    type: str
    bytes: int
    mean_kl: float
    max_logit_difference: float
    top1_agreement: float
    answers: int
    same_answers: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufResult(Result):
    """Result of `qlora verify --gguf`.

    files: those that llama.cpp opened. faults: of all files, one line each.
    """

    passed: bool
    files: tuple[GgufFileResult, ...]
    faults: tuple[str, ...]
