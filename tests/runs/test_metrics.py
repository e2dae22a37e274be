"""metrics.jsonl is read by the numbers of the steps, whatever happened to its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.runs.metrics import (
    append_line,
    best_evaluation,
    read_evaluations,
    read_steps,
    remove_lines_after,
)


def line(step: int, loss: float = 1.0, key: str = "loss") -> dict[str, float]:
    return {"step": step, key: loss}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of three steps with an evaluation after the second."""
    path = tmp_path / "metrics.jsonl"
    for content in (line(1), line(2), line(2, 0.5, "eval_loss"), line(3)):
        append_line(path, content)
    return path


def steps(file: Path) -> list[int]:
    return [item["step"] for item in read_steps(file)]


DAMAGE = {
    "cut": lambda content: content[:-4],
    "doubled": lambda content: content + content,
    "a step twice": lambda content: content + content.splitlines()[-1] + "\n",
    "NUL characters": lambda content: content + "\0" * 40,
    "another value": lambda content: content + "[1]\n7\nnull\n" + '{"step": true}\n{"step": "9"}\n',
    "no loss": lambda content: content + '{"step": 4}\n{"step": 4, "loss": null}\n',
    "deep brackets": lambda content: content + "[" * 100_000 + "\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_repeated_lines_do_not_count(file: Path, damage: str) -> None:
    file.write_text(DAMAGE[damage](file.read_text()))
    assert steps(file) == ([1, 2] if damage == "cut" else [1, 2, 3])
    assert [(item.step, item.loss) for item in read_evaluations(file)] == [(2, 0.5)]
    remove_lines_after(file, 2)
    kept = [json.loads(text) for text in file.read_text().splitlines()]
    assert kept == [line(1), line(2), line(2, 0.5, "eval_loss")]


def test_bytes_that_are_no_text_do_not_hide_the_others(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\xff\xfe\x80\n" + json.dumps(line(4)).encode() + b"\n")
    assert steps(file) == [1, 2, 3, 4]


def test_the_last_line_of_a_step_counts(file: Path) -> None:
    append_line(file, line(3, 9.0))
    append_line(file, line(2, 0.25, "eval_loss"))
    assert read_steps(file)[-1]["loss"] == 9.0
    best = best_evaluation(read_evaluations(file))
    assert best is not None
    assert best.loss == 0.25
