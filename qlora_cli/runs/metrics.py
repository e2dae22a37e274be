"""Reads and writes metrics.jsonl: one line per optimizer step, and one per evaluation.

The line of an evaluation has the key `eval_loss`, and its `step` is the number of optimizer steps
done before it: 0 before training. The line of a step has the key `loss` instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from qlora_cli.files.atomic import RESUME_HINT, atomic_file, report_write_errors

_LARGEST = 1e300
"""No value of a run is larger; a figure of larger ones cannot be drawn."""
_NEVER_NULL = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_bytes"}
EVAL_LOSS = "eval_loss"
"""The key that only the line of an evaluation has."""

_NO_METRICS = ("step", "seconds")
"""Keys of an evaluation's line that measure no quality; nor do those of the number of targets."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the held-out set after `step` optimizer steps.

    loss: in nats per target. metric: the metric that decides which evaluation is best, by its
    highest value; None if the lowest loss decides.
    """

    step: int
    loss: float
    metric: float | None = None

    @property
    def badness(self) -> float:
        """Return a number that is lowest for the best evaluation."""
        return self.loss if self.metric is None else -self.metric


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl is of an evaluation and not of a step."""
    return EVAL_LOSS in line


def wrong_value(line: Mapping[str, Any]) -> str | None:
    """Return the first key of a line whose value cannot be of a run; None if there is none."""
    loss = EVAL_LOSS if is_evaluation(line) else "loss"
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        return "step"
    if line.get(loss) is None:
        return loss
    return next((key for key, value in line.items() if not _can_be(key, value)), None)


def _can_be(key: str, value: Any) -> bool:
    """Return whether a metric can have a value: a number, or null if it may be unknown."""
    if value is None:
        return key not in _NEVER_NULL and not key.startswith("train_")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not _LARGEST <= abs(value) < inf


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Return the lines of the optimizer steps. Damaged lines are left out."""
    return [line for _, line in _read(file) if not is_evaluation(line)]


def mean_last_loss(file: Path, steps: int) -> float:
    """Return the mean loss of the last `steps` optimizer steps; there is at least one."""
    losses: list[float] = [line["loss"] for line in read_steps(file)[-steps:]]
    return sum(losses) / len(losses)


def read_evaluations(file: Path, metric: str | None = None) -> list[Evaluation]:
    """Return the evaluations in the order in which they were done, without damaged lines.

    metric: name of the metric that decides which one is best; None for the loss.
    """
    lines = [line for _, line in _read(file) if is_evaluation(line)]
    return [
        Evaluation(
            int(line["step"]),
            float(line[EVAL_LOSS]),
            None if metric is None else float(line.get(metric, -inf)),
        )
        for line in lines
    ]


def evaluation_metrics(file: Path, step: int) -> dict[str, float]:
    """Return the held-out loss after `step` and the task's other metrics, by their names.

    Empty if there is no evaluation of this step.
    """
    lines = (line for _, line in _read(file) if is_evaluation(line) and line["step"] == step)
    return {
        name: float(value)
        for name, value in next(lines, {}).items()
        if name == EVAL_LOSS or not (name.startswith("eval_") or name in _NO_METRICS)
    }


def best_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation with the lowest loss or highest metric; None if there is none.

    The evaluation before training is left out, and so is a loss that is not finite. Of equal ones
    the first is the best.
    """
    trained = [item for item in evaluations if item.step > 0 and isfinite(item.loss)]
    return min(trained, key=lambda evaluation: evaluation.badness, default=None)


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl. Raises QloraError if it cannot be written."""
    with report_write_errors(file.name, file, hint=RESUME_HINT), file.open("a") as metrics:
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        os.fsync(metrics.fileno())


def remove_lines_after(file: Path, step: int, *, keep_evaluation: bool = True) -> None:
    """Remove the lines of later steps than `step`, and damaged lines: these steps are done again.

    keep_evaluation: whether to keep the evaluation after `step` itself. Raises QloraError if the
    file cannot be written.
    """
    if not file.exists():
        return
    kept = [
        text
        for text, line in _read(file)
        if line["step"] < step
        or (line["step"] == step and (keep_evaluation or not is_evaluation(line)))
    ]
    with report_write_errors(file.name, file), atomic_file(file) as beside:
        beside.write_text("".join(f"{text}\n" for text in kept))


def _read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the text and the content of each line that is not damaged.

    Of several lines of the same step, or of the same evaluation, only the last one is returned.
    """
    lines: dict[tuple[int, bool], tuple[str, dict[str, Any]]] = {}
    content = file.read_text(errors="replace") if file.is_file() else ""
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # The process was stopped while it wrote this line.
        if isinstance(line, dict) and wrong_value(line) is None:
            place = line["step"], is_evaluation(line)
            lines.pop(place, None)
            lines[place] = text, line
    return list(lines.values())
