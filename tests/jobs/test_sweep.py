"""A sweep: the same results as single runs, one base, and runs that cannot be done."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import DoesNotFit, Interrupted, ProblemsError, QloraError, UsageError
from qlora_cli.events import Silent, StepEvent
from qlora_cli.jobs import prepare_training, sweep, train
from qlora_cli.jobs.sweep_results import DOES_NOT_FIT, DONE, FAILED, PENDING, SweepResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.grid import make_grid
from qlora_cli.recipe.load import load_recipe
from tests.helpers.interrupted import Stopper
from tests.helpers.observers import StageRecorder
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow

TEXT = """\
model: {{name: {base}}}
base: {{compute_dtype: float32}}
adapter: {{rank: 2, dropout: 0.1}}
data: {{train: {rows}, eval: {rows}, seq_len: 32}}
train: {{steps: 3, grad_accum: 1, lr: 1.0e-2, checkpoint_every: 1}}
output: {folder}/sweep
"""
AXES = ("adapter.rank=1,3", "adapter.targets=[q];all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and rows, of Llama's architecture."""
    made = tmp_path_factory.mktemp("sweep")
    make_base(made / "base", "llama", spread=0.15)
    make_rows(made / "rows.jsonl")
    return made


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    base, rows = folder / "base", folder / "rows.jsonl"
    path.write_text(TEXT.format(base=base, rows=rows, folder=tmp_path))
    return path


def run_sweep(
    recipe: Path, *texts: str, seeds: int | None = None, resume: bool = False, observer: Silent
) -> SweepResult:
    grid = make_grid(recipe, texts, seeds)
    return sweep.run(grid, recipe_path=recipe, resume=resume, observer=observer)


def weights(run: Path) -> bytes:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("weights/*.safetensors")]
    return file.read_bytes()


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def assert_like_single_runs(result: SweepResult, recipe: Path, alone: Path) -> None:
    """Assert that each run is bit for bit that of `qlora train` with its overrides."""
    for item in result.runs:
        single = load_recipe(recipe, [*item.overrides, f"output={alone / item.name}"])
        train.run(single, recipe_path=recipe, resume=False, observer=Silent())
        swept = result.folder / item.name
        assert weights(swept) == weights(alone / item.name)
        assert losses(swept) == losses(alone / item.name)


def test_each_run_is_bit_identical_to_the_run_alone_on_a_base_that_is_loaded_once(
    recipe: Path, tmp_path: Path
) -> None:
    observer = StageRecorder()
    result = run_sweep(recipe, *AXES, "train.seed=5", observer=observer)
    assert [run.status for run in result.runs] == [DONE] * 4
    assert [name for name, _ in observer.stages].count("load") == 1
    assert_like_single_runs(result, recipe, tmp_path / "alone")


def test_a_base_with_measured_scales_is_loaded_once(recipe: Path, tmp_path: Path) -> None:
    observer = StageRecorder()
    axes = ("adapter.rank=1,3", "base.scales=measured")
    result = run_sweep(recipe, *axes, observer=observer)
    assert [name for name, _ in observer.stages].count("load") == 1
    assert_like_single_runs(result, recipe, tmp_path / "alone")


def test_another_base_is_loaded_and_a_trained_one_is_not_used_again(
    recipe: Path, tmp_path: Path
) -> None:
    observer = StageRecorder()
    result = run_sweep(
        recipe, "base.bits=8,16", "adapter.method=full,lora", "adapter.dropout=0.0",
        observer=observer,
    )  # fmt: skip
    names = [run.name for run in result.runs]
    assert names == ["bits-8_method-lora", "bits-16_method-full", "bits-16_method-lora"]
    assert len(result.refused) == 1
    assert [name for name, _ in observer.stages].count("load") == 3
    again = [note for note in observer.notes if note.startswith("the base is loaded again")]
    assert again == [
        "the base is loaded again: base.bits is 16, adapter.method is full",
        "the base is loaded again: the run before has trained its weights",
    ]
    assert_like_single_runs(result, recipe, tmp_path / "alone")


def test_the_table_has_the_mean_and_the_spread_over_the_seeds(recipe: Path) -> None:
    result = run_sweep(recipe, "adapter.rank=1,3", seeds=2, observer=Silent())
    first, second = result.table
    values = [run.metrics["eval_loss"] for run in result.runs]
    assert first.mean["eval_loss"] == pytest.approx(sum(values[:2]) / 2)
    assert first.spread["eval_loss"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert first.seeds == second.seeds == (0, 1)
    assert second.mean["trainable_parameters"] == 3 * first.mean["trainable_parameters"]
    best = min(result.table, key=lambda cell: cell.mean["eval_loss"])
    assert result.best is best
    written = json.loads((result.folder / sweep.SWEEP_JSON).read_text())
    assert written | {"plot": None} == json.loads(json.dumps(result.to_dict()))
    assert "plot" not in written, "the figure is drawn later"


class StopInSecondRun(Stopper):
    """Sends SIGINT after the second step of the second run."""

    def __init__(self) -> None:
        super().__init__(after=0)

    def begin_run(self, number: int, total: int, name: str) -> None:
        self.after = 2 if number == 2 else 0


class StepCounter(Silent):
    """Counts optimizer steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, event: StepEvent) -> None:
        self.steps += 1


class KillInSecondRun(StopInSecondRun):
    """Kills this process after the second step of the second run."""

    def step(self, event: StepEvent) -> None:
        if event.step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_sweep_resumes_in_the_middle_of_a_run(recipe: Path, tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        try:
            run_sweep(recipe, "adapter.rank=1,2", observer=KillInSecondRun())
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    counter = StepCounter()
    result = run_sweep(recipe, "adapter.rank=1,2", resume=True, observer=counter)
    assert counter.steps <= 2, "at most the step without a checkpoint and the last one of run 2"
    assert_like_single_runs(result, recipe, tmp_path / "alone")


def test_a_stopped_sweep_resumes_in_the_middle_of_a_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped in run 2 of 3, rank-2"):
        run_sweep(recipe, "adapter.rank=1,2,3", observer=StopInSecondRun())
    written = json.loads((tmp_path / "sweep" / sweep.SWEEP_JSON).read_text())
    assert [run["status"] for run in written["runs"]] == [DONE, PENDING, PENDING]
    with pytest.raises(UsageError, match="is in use"):
        run_sweep(recipe, "adapter.rank=1,2,3", observer=Silent())
    counter = StepCounter()
    result = run_sweep(recipe, "adapter.rank=1,2,3,4", resume=True, observer=counter)
    assert counter.steps == 1 + 3 + 3, "the last step of run 2, and the runs 3 and 4"
    assert_like_single_runs(result, recipe, tmp_path / "alone")


def test_a_run_that_does_not_fit_is_skipped_and_reported(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_device() -> DeviceProfile:
        return DeviceProfile("cpu", "a small CPU", capacity_bytes=4_000_000)

    monkeypatch.setattr(prepare_training, "inspect_device", small_device)
    result = run_sweep(recipe, "adapter.rank=1,4096", observer=Silent())
    assert [run.status for run in result.runs] == [DONE, DOES_NOT_FIT]
    assert "a small CPU has 3.81 MiB" in (result.runs[1].reason or "")
    assert not (result.folder / "rank-4096").exists()
    assert [cell.seeds for cell in result.table] == [(0,), ()]
    monkeypatch.setattr(prepare_training, "inspect_device", inspect_device)
    resumed = run_sweep(recipe, "adapter.rank=1,4096", resume=True, observer=Silent())
    assert [run.status for run in resumed.runs] == [DONE, DONE]


def test_a_run_that_diverges_does_not_stop_the_others(recipe: Path) -> None:
    result = run_sweep(recipe, "train.lr=1e39,1e-3", "train.max_grad_norm=null", observer=Silent())
    assert [run.status for run in result.runs] == [FAILED, DONE]
    assert result.best is result.table[1]


def test_a_sweep_without_a_finished_run_is_an_error(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = DeviceProfile("cpu", "a tiny CPU", capacity_bytes=100_000)
    monkeypatch.setattr(prepare_training, "inspect_device", lambda: profile)
    with pytest.raises(DoesNotFit, match="no run of the sweep is done"):
        run_sweep(recipe, "adapter.rank=1,2", observer=Silent())
    monkeypatch.setattr(prepare_training, "inspect_device", inspect_device)
    with pytest.raises(QloraError, match="no run of the sweep is done"):
        run_sweep(
            recipe, "train.lr=1e39,1e40", "train.max_grad_norm=null", f"output={recipe.parent}/x",
            observer=Silent(),
        )  # fmt: skip


def test_a_wrong_cell_is_found_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="unknown adapter targets"):
        run_sweep(recipe, "adapter.targets=[q];[qq]", observer=Silent())
    assert not (tmp_path / "sweep").exists()


def test_only_a_sweep_is_resumed(recipe: Path) -> None:
    with pytest.raises(UsageError, match="is not a sweep's folder"):
        run_sweep(recipe, "adapter.rank=1,2", resume=True, observer=Silent())
