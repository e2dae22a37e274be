"""The result of `qlora eval --tasks`. Imports no torch, because `ui/` imports it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or of a group of tasks.

    filter: how lm-eval extracted the answers, for example `strict-match`; `none` for unchanged
    answers. stderr: standard error of `value`; None if lm-eval computes none. num_fewshot: examples
    before each question; None for a group. samples: number of rows. version: of the task.
    """

    task: str
    metric: str
    filter: str
    value: float | str
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    samples: int | None
    version: str | None


@dataclass(frozen=True)
class TasksResult(Result):
    """Result of `qlora eval --tasks`.

    scores: of groups and tasks in lm-eval's order. lm_eval: version of the package. limit: number
    of rows of each task that were used; None for all. chat_template: whether prompts were formatted
    with the chat template.
    """

    scores: tuple[TaskScore, ...]
    lm_eval: str
    limit: int | None
    chat_template: bool
