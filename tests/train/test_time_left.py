"""The estimated time that is left is right within a tenth after a twentieth of the steps.

The times are those of real runs (`tools/benchmarks/record_step_times.py`); nothing is timed here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.collate import BatchSize
from qlora_cli.data.encode import Example
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.train.step_time_fit import PlannedTime
from qlora_cli.train.time_left import Interruptions, TimeLeft, WorkLeft

RECORDED = sorted((Path(__file__).parent / "step_times").glob("*.json"))
TOLERANCE = 0.10


def schedule_of(rows: list[int], **settings: Any) -> BatchSchedule:
    """Return the schedule of rows with these numbers of tokens."""
    examples = [Example([1] * n, [IGNORE_INDEX] * n, "row") for n in rows]
    return BatchSchedule(examples, **settings)


def estimate_of(recorded: dict[str, Any]) -> TimeLeft:
    """Return the estimate at the start of a recorded run."""
    schedule = schedule_of(recorded["rows"], **recorded["schedule"])
    sizes = tuple(BatchSize(**size) for size in recorded["between"]["eval_batches"])
    between = Interruptions(**recorded["between"] | {"eval_batches": sizes})
    work = WorkLeft(schedule, between.steps, recorded["tracked"])
    return TimeLeft(work, PlannedTime(**recorded["planned"]), between)


def replayed(recorded: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (estimated, true) seconds that are left at the end of each step of a recorded run."""
    estimate, events = estimate_of(recorded), recorded["events"]
    found: list[tuple[float, float]] = []
    for number, (kind, seconds, *rest) in enumerate(events):
        if kind == "step":
            estimate.add_step(len(found), seconds)
            left = sum(later[1] for later in events[number + 1 :])
            found.append((estimate.seconds(len(found)), left))
        elif kind == "evaluation":
            estimate.add_evaluation(rest[0], seconds, rest[1])
        else:
            estimate.add_checkpoint(seconds)
    return found


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_the_time_left_is_right_after_a_twentieth_of_the_steps(file: Path) -> None:
    found = replayed(json.loads(file.read_text()))
    estimated, true = found[math.ceil(0.05 * len(found)) - 1]
    assert abs(estimated - true) <= TOLERANCE * true


def test_there_are_recorded_runs() -> None:
    assert len(RECORDED) >= 3


def test_the_estimate_counts_evaluations_checkpoints_and_slow_first_steps() -> None:
    """Seeded fault: without evaluations, or with the slow steps as typical, it is wrong."""
    file = next(file for file in RECORDED if "unpacked" in file.stem)
    recorded = json.loads(file.read_text())
    for left_out in (
        {"between": recorded["between"] | {"eval_batches": [], "checkpoint_every": 10**6}},
        {"tracked": []},
    ):
        found = replayed(recorded | left_out)
        estimated, true = found[math.ceil(0.05 * len(found)) - 1]
        right, _ = replayed(recorded)[math.ceil(0.05 * len(found)) - 1]
        assert abs(estimated - right) > 0.02 * true
