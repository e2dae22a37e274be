"""Record how long the steps, evaluations and checkpoints of a training run take.

`tests/train/test_time_left.py` replays such files to the estimate of the time that is left. Each
round is a run of its own with the same settings, and the recorded time is the shortest of all
rounds, in processor time, because other programs disturb a run.

    python tools/benchmarks/record_step_times.py RECIPE [key=value ...] --out FILE --rounds 3
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora_cli.events import Silent
from qlora_cli.jobs import train
from qlora_cli.jobs.planned_time import time_left
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.time_left import TimeLeft


class RecordingTimeLeft(TimeLeft):
    """An estimate that also stores its events, with processor time."""

    def __init__(self, other: TimeLeft) -> None:
        super().__init__(other.work, other.planned, other.between, other.parts)
        self.events: list[list[Any]] = []

    def lap(self) -> float:
        """Return the processor seconds since the last call."""
        start, self._lap_start = self._lap_start, time.process_time()
        return self._lap_start - start

    def add_step(self, step: int, seconds: float) -> None:
        """Store a step."""
        super().add_step(step, seconds)
        self.events.append(["step", seconds])

    def add_evaluation(self, step: int, seconds: float, is_best: bool) -> None:
        """Store an evaluation."""
        super().add_evaluation(step, seconds, is_best)
        self.events.append(["evaluation", seconds, step, is_best])

    def add_checkpoint(self, seconds: float) -> None:
        """Store a checkpoint."""
        super().add_checkpoint(seconds)
        self.events.append(["checkpoint", seconds])


def record(recipe_path: Path, overrides: list[str]) -> dict[str, Any]:
    """Train once in a temporary folder and return what happened."""
    found: dict[str, Any] = {}
    recorders: list[RecordingTimeLeft] = []

    def recording(job: TrainingJob, *rest: Any) -> TimeLeft:
        recorders.append(RecordingTimeLeft(time_left(job, *rest)))
        recipe, between = job.prepared.recipe, recorders[0].between
        found["rows"] = [int(size) for size in job.schedule._lengths]
        found["schedule"] = {
            "seq_len": recipe.data.seq_len,
            "packing": recipe.data.packing,
            "micro_batch": recipe.train.pass_size,
            "grad_accum": recipe.train.grad_accum,
            "seed": recipe.train.seed,
        }
        found["tracked"] = sorted(recorders[0].work.tracked)
        found["planned"] = asdict(recorders[0].planned)
        found["between"] = asdict(between)
        return recorders[0]

    train.time_left = recording  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(recipe_path, [*overrides, f"output={folder}/run"])
        train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    return found | {"events": recorders[0].events}


def least_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first round with the fewest seconds of each event in all rounds."""
    events = []
    for same in zip(*(found["events"] for found in rounds), strict=True):
        seconds = min(event[1] for event in same)
        events.append([same[0][0], round(seconds, 4), *same[0][2:]])
    return rounds[0] | {"rounds": len(rounds), "events": events}


def main() -> None:
    """Record a recipe and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = [record(options.recipe, options.overrides) for _ in range(options.rounds)]
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    options.out.write_text(json.dumps(facts | least_of(rounds)) + "\n")


if __name__ == "__main__":
    main()
