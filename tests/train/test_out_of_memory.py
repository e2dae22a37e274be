"""A micro-batch that does not fit the memory is divided; the gradient stays the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import DoesNotFit, Interrupted
from qlora_cli.jobs import report, train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from qlora_cli.tasks.causal import CausalTask
from qlora_cli.train.adamw import AdamW
from tests.helpers.interrupted import train_run
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import assert_same_run, make_bases, recipe_of
from tests.helpers.runs import make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
STEPS = 4
EVALUATED: dict[str, Any] = {"train": {"checkpoint_every": 1, "eval_every": 2}}

Steps = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("base")
    rows = make_rows(folder / "rows.jsonl", num=24, length=12)
    settings: dict[str, Any] = {"steps": STEPS, "micro_batch": 2, "grad_accum": 2}
    # Set, so that micro-batches are divided at once.
    settings |= {"activation_checkpointing": True}
    base = make_base(folder / "base", "llama", spread=0.1)
    return make_recipe(base, rows, data={"seq_len": 32}, train=settings)


@pytest.fixture(scope="module")
def undivided(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Return the steps of a run that has enough memory."""
    steps, notes = run(recipe, tmp_path_factory.mktemp("undivided") / "run")
    assert not any("divided" in note for note in notes)
    return steps


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def evaluated(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return an uninterrupted run with the settings EVALUATED."""
    return train_run(recipe_of(bases, tmp_path_factory.mktemp("evaluated") / "run", **EVALUATED))


def run(recipe: Recipe, output: Path) -> tuple[Steps, list[str]]:
    """Return (loss, gradient norm) of each step and the notes of a run."""
    recorder = NoteRecorder()
    changed = recipe.model_copy(update={"output": str(output)})
    train.run(changed, recipe_path=None, resume=False, observer=recorder)
    lines = read_steps(RunFolder(output).metrics)
    return [(line["loss"], line["grad_norm"]) for line in lines], recorder.notes


def failing(where: str, max_segments: int, error: Exception) -> Callable[..., Any]:
    """Return `CausalTask.loss` that fails on a batch with more rows than `max_segments`."""
    real = CausalTask.loss

    def loss(self: CausalTask, loaded: Any, batch: Any, *rest: Any) -> Any:
        too_large = loaded.model.training and len(batch.segments) > max_segments
        too_large = too_large and not batch.input_ids.is_meta and rest[0].type != "meta"
        if too_large and where == "forward":
            raise error
        result = real(self, loaded, batch, *rest)
        if too_large:
            result.register_hook(lambda _: raise_(error))
        return result

    return loss


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()], ids=["gpu", "host"])
def test_a_step_that_runs_out_of_memory_is_repeated_in_parts(
    recipe: Recipe,
    undivided: Steps,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    monkeypatch.setattr(CausalTask, "loss", failing(where, 2, error))
    divided, notes = run(recipe, tmp_path / "divided")
    assert len(divided) == STEPS
    for found, wanted in zip(divided, undivided, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert sum("each micro-batch is divided into" in note for note in notes) >= 1
    assert any("step 1: " in note and "out of memory" in note for note in notes)


def test_a_single_row_that_does_not_fit_ends_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names settings, and with each of them less memory is planned."""
    monkeypatch.setattr(CausalTask, "loss", failing("forward", 0, OUT_OF_MEMORY))
    with pytest.raises(DoesNotFit, match="have one row each and cannot be divided") as caught:
        run(recipe, tmp_path / "run")
    assert caught.value.hint is not None
    planned = re.search(r"was planned with ([\d.]+ \w+); less is needed with", caught.value.hint)
    assert planned is not None
    changes = re.findall(r"([\w.]+=\S+) \(([\d.]+ \w+)\)", caught.value.hint)
    assert changes
    for _, size in changes:
        assert bytes_of(size) <= 0.91 * bytes_of(planned[1])


def bytes_of(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def raising(error: Exception, on_call: int) -> Callable[..., Any]:
    """Return a function that raises an error when it is called for the given time."""
    calls = [0]

    def call(real: Callable[..., Any], *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == on_call:
            raise error
        return real(*arguments)

    return call


def is_planned(owner: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call is of a dry run, whose tensors are on meta."""
    if isinstance(owner, AdamW):
        return bool(owner.param_groups[0]["params"][0].is_meta)
    return bool(arguments[-1].type == "meta")


PLACES = {
    "the optimizer": (AdamW, "apply", 3),
    "the evaluation before training": (CausalTask, "evaluate", 1),
    "an evaluation in training": (CausalTask, "evaluate", 3),
}


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("the optimizer", OUT_OF_MEMORY),
        ("the evaluation before training", OUT_OF_MEMORY),
        ("an evaluation in training", MemoryError()),
    ],
)
def test_a_lack_of_memory_elsewhere_ends_the_run_and_loses_nothing(
    bases: Path,
    evaluated: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    stopped = recipe_of(bases, tmp_path / "stopped", **EVALUATED)
    owner, name, on_call = PLACES[place]
    real, fail = getattr(owner, name), raising(error, on_call)

    def call(self: Any, *arguments: Any) -> Any:
        return (
            real(self, *arguments) if is_planned(self, arguments) else fail(real, self, *arguments)
        )

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(DoesNotFit, match="out of memory"):
            train_run(stopped)
    resume = (tmp_path / "stopped" / "run.json").is_file()
    assert resume == (place != "the evaluation before training")
    assert_same_run(train_run(stopped, resume=resume), evaluated)


def test_another_error_is_not_taken_for_a_lack_of_memory(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalTask, "loss", failing("forward", 2, RuntimeError("a wrong shape")))
    with pytest.raises(RuntimeError, match="a wrong shape"):
        run(recipe, tmp_path / "run")


def failing_first(times: int) -> Callable[..., Any]:
    """Return `CausalTask.loss` that runs out of memory in its first `times` calls of a job."""
    real, calls = CausalTask.loss, []

    def loss(self: CausalTask, loaded: Any, batch: Any, *rest: Any) -> Any:
        if loaded.model.training and rest[0].type != "meta":
            calls.append(loaded.recomputation.policy.num_recomputed)
            if len(calls) <= times:
                raise OUT_OF_MEMORY
        return real(self, loaded, batch, *rest)

    return loss


def with_policy(recipe: Recipe, setting: Any) -> Recipe:
    train = recipe.train.model_copy(update={"activation_checkpointing": setting})
    return recipe.model_copy(update={"train": train})


def test_more_blocks_are_recomputed_before_micro_batches_are_divided(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has two blocks: none is recomputed, then one, then both, then parts."""
    recipe = with_policy(recipe, "auto")
    whole, _ = run(recipe, tmp_path / "whole")
    monkeypatch.setattr(CausalTask, "loss", failing_first(2))
    repeated, notes = run(recipe, tmp_path / "repeated")
    assert repeated == whole, "recomputation changes no bit"
    record = RunFolder(tmp_path / "repeated").read()
    shortages = record["memory_shortages"]
    assert [(s["step"], s["recomputed_blocks"], s["parts"]) for s in shortages] == [
        (1, 1, 1),
        (1, 2, 1),
    ]
    assert all("out of memory" in s["reason"] for s in shortages)
    assert sum("blocks are recomputed in the backward pass" in note for note in notes) == 2
    assert record["recipe"]["train"]["activation_checkpointing"] == 0
    monkeypatch.undo()
    monkeypatch.setattr(CausalTask, "loss", failing_first(3))
    divided, notes = run(recipe, tmp_path / "divided")
    for found, wanted in zip(divided, whole, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert sum("each micro-batch is divided into 2 parts" in note for note in notes) == 1


@pytest.mark.parametrize(("times", "setting", "parts"), [(2, True, 1), (3, True, 2)])
def test_the_ledger_has_the_plan_of_what_applied_in_the_end(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    setting: bool,
    parts: int,
) -> None:
    """It is the plan of a run that has these settings from the start, with rows of one length."""
    data = recipe.data.model_copy(update={"packing": False, "eval": None})
    recipe = recipe.model_copy(update={"data": data})
    monkeypatch.setattr(CausalTask, "loss", failing_first(times))
    run(with_policy(recipe, "auto"), tmp_path / "short")
    monkeypatch.undo()
    train = recipe.train.model_copy(update={"micro_batch": 2 // parts, "grad_accum": 2 * parts})
    run(with_policy(recipe.model_copy(update={"train": train}), setting), tmp_path / "set")
    short, wanted = (report.read_ledger(RunFolder(tmp_path / name)) for name in ("short", "set"))
    assert short.planned_peak_bytes == wanted.planned_peak_bytes
    (note,) = (note for note in short.notes if "Memory ran short in step 1" in note)
    assert "2 recomputed blocks" in note
    assert f"in {parts} part" in note


def test_a_policy_that_is_set_is_obeyed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalTask, "loss", failing_first(1))
    run(with_policy(recipe, 1), tmp_path / "run")
    (shortage,) = RunFolder(tmp_path / "run").read()["memory_shortages"]
    assert (shortage["recomputed_blocks"], shortage["parts"]) == (1, 2)


def test_a_resumed_run_keeps_the_policy(recipe: Recipe, tmp_path: Path) -> None:
    """Also one that a shortage has changed, and the result has the same bits."""
    recipe = with_policy(recipe, "auto").model_copy(update={"output": str(tmp_path / "run")})
    whole, _ = run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    folder = RunFolder(tmp_path / "run")
    shortage = {"step": 1, "reason": "out of memory", "recomputed_blocks": 1, "parts": 1}
    folder.write(folder.read() | {"memory_shortages": [shortage]})
    train_run(recipe, resume=True)
    record = folder.read()
    assert record["recipe"]["train"]["activation_checkpointing"] == 1
    assert record["memory_shortages"] == [shortage]
    assert "train.activation_checkpointing" in {c["key"] for c in record["choices"]}
    lines = read_steps(folder.metrics)
    assert [(line["loss"], line["grad_norm"]) for line in lines] == whole
