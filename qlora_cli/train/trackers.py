"""Experiment trackers, such as TensorBoard, that receive the settings and figures of a run.

A tracker that cannot start is an error before training. A tracker that fails during training is a
warning: it gets nothing more, and training continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from qlora_cli.errors import UsageError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train.runtime import make_tracker
from qlora_cli.train.tracker_servers import check_reachable

_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Name of a tracker -> the packages of which one must be installed."""


class Tracker(Protocol):
    """The part of accelerate's interface of a tracker that is used here."""

    def start(self) -> None:
        """Connect to the service or open the files."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings of the run."""

    def log(self, values: dict[str, Any], step: int | None) -> None:
        """Store figures of a step."""

    def finish(self) -> None:
        """Close the tracker."""


def check_trackers(recipe: Recipe) -> None:
    """Raise UsageError if a tracker of `train.log_to` is not installed or not reachable."""
    for name in recipe.train.log_to:
        if not any(find_spec(module) for module in _MODULES[name]):
            raise UsageError(
                f"train.log_to names {name}, which is not installed",
                where="train.log_to",
                hint=f"pip install {_MODULES[name][0]}, or remove {name} from train.log_to",
            )
        check_reachable(name)


@dataclass
class Trackers:
    """The trackers of a run that have started. warn: reports a tracker that fails."""

    warn: Callable[[str], object]
    active: dict[str, Tracker] = field(default_factory=dict)

    @classmethod
    def start(cls, recipe: Recipe, run: RunFolder, warn: Callable[[str], object]) -> Trackers:
        """Start the trackers of `train.log_to` and store the recipe in them.

        TensorBoard writes to the folder `tensorboard` of the run; the others use their own
        settings, such as WANDB_MODE and MLFLOW_TRACKING_URI. Raises UsageError if one cannot start.
        """
        trackers = cls(warn)
        for name in recipe.train.log_to:
            try:
                tracker = _start(name, run.path)
                tracker.store_init_configuration(_flatten(recipe.model_dump(mode="json")))
            # A tracker can raise any exception of its own client and of the network.
            except Exception as fault:
                trackers.close()
                raise UsageError(
                    f"{name} cannot start: {_first_line(fault)}",
                    where="train.log_to",
                    hint=_start_hint(name, fault),
                ) from fault
            trackers.active[name] = tracker
        return trackers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Pass the numbers in `values` to every tracker. step: number of steps done."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.finish())
        self.active.clear()

    def _each(self, action: Callable[[Tracker], object]) -> None:
        """Call `action` with every tracker. A tracker that fails is reported and then left out."""
        for name, tracker in list(self.active.items()):
            try:
                action(tracker)
            except Exception as fault:
                del self.active[name]
                self.warn(
                    f"warning: {name} failed and gets nothing more of this run: "
                    f"{_first_line(fault)}"
                )


def _start(name: str, folder: Path) -> Tracker:
    tracker: Tracker = make_tracker(name, folder)
    tracker.start()
    return tracker


def _start_hint(name: str, fault: Exception) -> str:
    if isinstance(fault, ImportError):
        return f"pip install --upgrade {_MODULES[name][0]}, or remove {name} from train.log_to"
    return (
        "check that its server is reachable and that you are logged in, or remove "
        f"{name} from train.log_to"
    )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> number or text of nested settings. Other values become text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _first_line(fault: Exception) -> str:
    lines: Sequence[str] = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
