"""Training that is stopped with Ctrl-C after a step, as a terminal would."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from qlora_cli.events import Silent, StepEvent
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder


class Stopper(Silent):
    """Presses Ctrl-C when a step is done."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, event: StepEvent) -> None:
        if event.step == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def go(recipe: Recipe, *, resume: bool = False, stop_after: int | None = None) -> RunFolder:
    """Trains; raises Interrupted where it is stopped."""
    observer = Silent() if stop_after is None else Stopper(stop_after)
    train.run(recipe, recipe_path=None, resume=resume, observer=observer)
    return RunFolder(Path(recipe.output))
