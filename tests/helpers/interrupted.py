"""Train a recipe, and interrupt the training after a step as Ctrl-C does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from qlora_cli.events import Silent, StepEvent
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder


class Stopper(Silent):
    """An observer that sends SIGINT to this process after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, event: StepEvent) -> None:
        if event.step == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def train_run(recipe: Recipe, *, resume: bool = False, stop_after: int | None = None) -> RunFolder:
    """Train the recipe and return its run.

    stop_after: step after which the training is interrupted, which raises Interrupted; None to
    train to the end.
    """
    observer = Silent() if stop_after is None else Stopper(stop_after)
    train.run(recipe, recipe_path=None, resume=resume, observer=observer)
    return RunFolder(Path(recipe.output))
