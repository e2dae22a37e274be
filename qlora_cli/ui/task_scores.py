"""Render the result of `qlora eval --tasks`."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.task_results import TaskScore, TasksResult
from qlora_cli.units import format_count

_ARROWS = {True: " ↑", False: " ↓", None: ""}


def render(result: TasksResult) -> RenderableType:
    """Render one line per metric. An arrow shows whether higher or lower is better."""
    table = Table(box=box.SIMPLE)
    for name in ("task", "metric", "filter"):
        table.add_column(name)
    for name in ("value", "stderr", "few-shot", "rows"):
        table.add_column(name, justify="right")
    for score in result.scores:
        table.add_row(*_cells(score))
    prompts = f"prompts {'with' if result.chat_template else 'without'} the chat template"
    limit = "" if result.limit is None else f"; the first {result.limit} rows of each task only"
    return Group(table, Text(f"lm-eval {result.lm_eval}, {prompts}{limit}", style="dim"))


def _cells(score: TaskScore) -> tuple[str, ...]:
    value = score.value if isinstance(score.value, str) else f"{score.value:.4f}"
    return (
        score.task,
        score.metric + _ARROWS[score.higher_is_better],
        score.filter,
        value,
        "" if score.stderr is None else f"± {score.stderr:.4f}",
        "" if score.num_fewshot is None else str(score.num_fewshot),
        "" if score.samples is None else format_count(score.samples),
    )
