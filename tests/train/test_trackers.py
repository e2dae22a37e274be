"""Trackers: what they receive, and what happens if one is missing or fails."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.jobs import train
from qlora_cli.recipe.describe import accepts, field_at
from qlora_cli.recipe.override import Override, parse_override
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train import trackers
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import recipe_of
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow


class RecordingTracker:
    """Records what it receives. fails_at: step whose figures it cannot store."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.settings: dict[str, Any] = {}
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.is_closed = False

    def start(self) -> None:
        if self.fails_at == 0:
            raise ConnectionError("no route to the server")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None) -> None:
        if step is not None and step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl", num=4, length=12)
    make_base(folder / "llama", "llama", spread=0.1)
    return folder


def recipe_with(bases: Path, output: Path, name: str) -> Recipe:
    return recipe_of(bases, output, train={"steps": 2, "log_to": [name]})


def use(monkeypatch: pytest.MonkeyPatch, tracker: RecordingTracker) -> RecordingTracker:
    monkeypatch.setattr(trackers, "make_tracker", lambda name, folder: tracker)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    return tracker


def run(recipe: Recipe) -> list[str]:
    """Train the recipe and return the notes."""
    observer = NoteRecorder()
    train.run(recipe, recipe_path=None, resume=False, observer=observer)
    return observer.notes


def test_a_tracker_receives_the_recipe_and_all_figures(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = use(monkeypatch, RecordingTracker())
    run(recipe_with(bases, tmp_path / "run", "wandb"))
    assert tracker.settings["train.lr"] == 1e-2
    assert [step for step, _ in tracker.lines] == [0, 1, 2, 2, 2]
    names = {name for _, values in tracker.lines for name in values}
    assert {"loss", "lr", "grad_norm", "eval_loss", "peak_bytes", "measured_peak_bytes"} <= names
    assert tracker.is_closed


def test_a_tracker_that_fails_is_a_warning(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = use(monkeypatch, RecordingTracker(fails_at=1))
    notes = run(recipe_with(bases, tmp_path / "run", "mlflow"))
    assert sum("mlflow failed" in note and "the server is gone" in note for note in notes) == 1
    assert [step for step, _ in tracker.lines] == [0]
    assert RunFolder(tmp_path / "run").read()["status"] == "done"


def test_a_tracker_that_cannot_start_is_an_error_before_the_run(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, RecordingTracker(fails_at=0))
    with pytest.raises(UsageError, match="trackio cannot start: no route to the server"):
        run(recipe_with(bases, tmp_path / "run", "trackio"))
    assert not (tmp_path / "run").exists()


def test_a_package_that_cannot_be_imported_is_to_be_installed_again(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, folder: Path) -> None:
        raise ImportError("cannot import name 'service'")

    use(monkeypatch, RecordingTracker())
    monkeypatch.setattr(trackers, "make_tracker", fail)
    with pytest.raises(UsageError, match="cannot start: cannot import name 'service'") as error:
        run(recipe_with(bases, tmp_path / "run", "mlflow"))
    assert "pip install --upgrade mlflow" in str(error.value)


def test_a_missing_package_is_an_error_before_the_run(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb, which is not installed"):
        run(recipe_with(bases, tmp_path / "run", "wandb"))
    assert not (tmp_path / "run").exists()


def test_a_server_that_does_not_listen_is_an_error_within_seconds(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, RecordingTracker())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        run(recipe_with(bases, tmp_path / "reached", "mlflow"))
    with pytest.raises(UsageError, match=r"its server at 127\.0\.0\.1 is not reachable"):
        run(recipe_with(bases, tmp_path / "run", "mlflow"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["tensorboard", "tensorboard,wandb", "[tensorboard, wandb]"])
def test_the_setting_is_a_list_of_names(text: str) -> None:
    override = parse_override(f"train.log_to={text}")
    assert isinstance(override, Override)
    assert override.value == text.strip("[]").replace(" ", "").split(",")
    info = field_at("train.log_to")
    assert info is not None
    assert accepts(info) == "a list of tensorboard or wandb or mlflow or trackio"


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_event_files(bases: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notes = run(recipe_with(bases, tmp_path / "run", "tensorboard"))
    assert not [note for note in notes if "failed" in note]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 2]
