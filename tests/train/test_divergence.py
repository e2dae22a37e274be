"""Training that diverges stops in that step, and no file gets a value that is NaN or infinite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.data.collate import collate
from qlora_cli.errors import ModelError, NotFinite, QloraError
from qlora_cli.events import Silent
from qlora_cli.files.checksums import CHECKSUMS
from qlora_cli.jobs import train
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from qlora_cli.runs.resume import save_checkpoint
from qlora_cli.train import loop
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.evaluation import Evaluator
from qlora_cli.train.loss_scale import LossScale
from qlora_cli.train.step import train_step
from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.runs import make_base, make_recipe, make_rows
from tests.helpers.training import FLOAT16, ROWS, make_nonfinite, make_state

pytestmark = pytest.mark.slow

STEPS = 6
FLOAT16_SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "float16 compute": {"base": {"compute_dtype": "float16"}},
    "float16 adapter": {"adapter": {"dtype": "float16"}},
    "both": FLOAT16,
}
FULL = {"method": "full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "llama", spread=0.15)


def job(folder: Path, model: Path, lr: float, every: int, **sections: Any) -> Outcome:
    """Run `qlora train` for STEPS steps into `folder/run`. every: steps between checkpoints."""
    settings = {
        "steps": STEPS,
        "grad_accum": 1,
        "lr": lr,
        "schedule": "constant",
        "warmup": 0.0,
        "checkpoint_every": every,
        "max_grad_norm": None,
    }
    rows = make_rows(folder / "rows.jsonl")
    recipe = make_recipe(model, rows, train=settings, **sections)
    content = recipe.model_dump(mode="json", exclude_unset=True) | {"output": str(folder / "run")}
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(content))
    return qlora("train", folder / "job.yaml")


def check_stopped(outcome: Outcome, folder: Path) -> RunFolder:
    """Check that the run failed with one error and stored finite values only. Return its folder."""
    assert outcome.code == 1, outcome.err
    assert outcome.err.count("error: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "unexpected" not in outcome.err
    assert "not finite" in outcome.err
    assert "lower train.lr" in outcome.err
    run = RunFolder(folder / "run")
    assert not run.adapter.exists()
    assert not run.weights.exists()
    for file in run.path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file
    assert not list(run.path.rglob("*.partial"))
    return run


@pytest.mark.parametrize("kind", FLOAT16_SECTIONS)
@pytest.mark.parametrize("every", [1, 100])
def test_float16_with_a_huge_learning_rate_stops(
    tmp_path: Path, base: Path, kind: str, every: int
) -> None:
    run = check_stopped(job(tmp_path, base, 1e6, every, **FLOAT16_SECTIONS[kind]), tmp_path)
    if run.metrics.exists():
        assert run.read()["status"] == "failed"
        assert len(read_steps(run.metrics)) < STEPS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_float32_names_the_last_good_checkpoint(tmp_path: Path, base: Path, method: str) -> None:
    sections = {"base": {"bits": 16, "compute_dtype": "float32"}, "adapter": {"method": method}}
    outcome = job(tmp_path, base, 1e25, 1, **sections)
    run = check_stopped(outcome, tmp_path)
    assert run.read()["status"] == "failed"
    assert run.steps(), outcome.err
    last = run.steps()[-1]
    assert f"the last good checkpoint is of step {last}: {run.checkpoint(last)}" in outcome.err


def test_without_a_checkpoint_the_error_states_that_there_is_none(
    tmp_path: Path, base: Path
) -> None:
    outcome = job(tmp_path, base, 1e25, 100)
    assert not check_stopped(outcome, tmp_path).steps()
    assert "there is no checkpoint" in outcome.err


def make_nonfinite_at(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """Let the update of step `at` store `value` in a parameter. The loss of that step is finite."""
    original = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        outcome = original(state, *rest)
        if state.step == at:
            with torch.no_grad():
                next(reversed(state.trainable.values())).view(-1)[-1] = value
        return outcome

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_parameter_is_checked_before_its_checkpoint_is_written(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    make_nonfinite_at(monkeypatch, 3, value)
    outcome = job(tmp_path, base, 1e-4, 1)
    run = check_stopped(outcome, tmp_path)
    assert run.steps() == [1, 2]
    assert "after step 3: " in outcome.err
    assert "lora_b" in outcome.err
    assert f"of step 2: {run.checkpoint(2)}" in outcome.err


def test_the_last_step_is_checked_before_the_adapter_is_written(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nonfinite_at(monkeypatch, STEPS, float("inf"))
    outcome = job(tmp_path, base, 1e-4, 100)
    assert not check_stopped(outcome, tmp_path).steps()
    assert "there is no checkpoint" in outcome.err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_weights_that_are_not_finite_are_not_written(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Also if a weight becomes NaN after the last checkpoint."""
    original = train.write_weights

    def write(state: Any, *arguments: Any) -> None:
        with torch.no_grad():
            next(iter(state.trainable.values())).view(-1)[0] = float("nan")
        original(state, *arguments)

    monkeypatch.setattr(train, "write_weights", write)
    sections = {"base": {"bits": 16, "compute_dtype": "float32"}, "adapter": {"method": method}}
    outcome = job(tmp_path, base, 1e-4, 100, **sections)
    run = check_stopped(outcome, tmp_path)
    assert f"the last good checkpoint is of step {STEPS}" in outcome.err
    assert run.read()["status"] == "failed"


def test_a_failed_write_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    trained = {"a": torch.nn.Parameter(torch.ones(3))}
    optimizer, scale = AdamW(trained.values(), 0.0), LossScale(needed=False).state()
    save_checkpoint(run, 1, trained, optimizer, scale)
    trained["a"].data[1] = float("nan")
    with pytest.raises(NotFinite, match="after step 2: a is not finite"):
        save_checkpoint(run, 2, trained, optimizer, scale)
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-000001"]


def test_a_checkpoint_of_an_older_version_that_is_not_finite_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nonfinite_at(monkeypatch, 3, float("nan"))
    run = check_stopped(job(tmp_path, base, 1e-4, 1), tmp_path)
    monkeypatch.undo()
    file = run.checkpoint(2) / "trained.safetensors"
    values = load_file(file)
    next(iter(values.values())).view(-1)[0] = float("nan")
    save_file(values, file, metadata={"format": "pt"})
    (run.checkpoint(2) / CHECKSUMS).unlink()  # Which older versions did not write.
    outcome = qlora("train", tmp_path / "job.yaml", "--resume")
    assert outcome.code == ModelError.exit_code, outcome.err
    assert "not finite" in outcome.err
    assert str(run.checkpoint(2)) in outcome.err


def test_a_loss_that_is_not_finite_is_not_treated_as_overflow(tmp_path: Path) -> None:
    state = make_state(tmp_path, **FLOAT16)
    make_nonfinite(state, float("inf"))
    before = state.loss_scale.value
    with pytest.raises(QloraError, match="step 1: the loss is nan"):
        train_step(state, [collate(ROWS[:1])], 1e-3)
    assert state.loss_scale.value == before


def test_a_parameter_that_is_not_finite_is_not_treated_as_overflow(tmp_path: Path) -> None:
    """The NaN does not reach the loss, because no row contains its token."""
    state = make_state(tmp_path, base={"bits": 16, "compute_dtype": "float16"}, adapter=FULL)
    unused = min(set(range(250)) - {token for row in ROWS for token in row.ids})
    with torch.no_grad():
        state.trainable["model.embed_tokens.weight"][unused] = float("nan")
    state.loss_scale.value = 2.0**40
    with pytest.raises(QloraError, match=r"step 1: model\.embed_tokens\.weight is not finite"):
        train_step(state, [collate(ROWS)], 1e-3)


def test_overflows_with_a_finite_loss_are_skipped_and_counted(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale, "FIRST", 2.0**40)
    monkeypatch.setattr(Evaluator, "evaluate_if_due", lambda *_: None)
    outcome = job(tmp_path, base, 1e-4, 1, **FLOAT16)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("float16 gradients overflowed") >= 3
    run = RunFolder(tmp_path / "run")
    assert run.steps() == [STEPS - 1, STEPS]  # train.keep_checkpoints is 2
    assert run.read()["status"] == "done"


def test_the_job_raises_not_finite(tmp_path: Path, base: Path) -> None:
    """The class of the error for callers of the job without the command line."""
    settings = {"steps": 3, "grad_accum": 1, "lr": 1e25, "warmup": 0.0}
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), train=settings)
    recipe = recipe.model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(NotFinite, match="not finite"):
        train.run(recipe, recipe_path=None, resume=False, observer=Silent())
