"""A run's memory files: complete after a resume, with a measured baseline on request."""

from __future__ import annotations

import html
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted, QloraError, UsageError
from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.jobs import full_finetune_baseline, report
from qlora_cli.memory.ledger import MethodPeak
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.ui import report as page
from qlora_cli.ui import timelines
from tests.helpers.interrupted import train_run
from tests.helpers.runs import make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_rows(folder / "rows.jsonl", num=17, length=12)
    return make_base(folder / "llama", "llama", spread=0.1)


def recipe_of(base: Path, output: Path, **sections: Any) -> Recipe:
    sections["train"] = {"steps": STEPS, "grad_accum": 2, **sections.get("train", {})}
    recipe = make_recipe(base, base.parent / "rows.jsonl", **sections)
    return recipe.model_copy(update={"output": str(output)})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(recipe_of(base, tmp_path_factory.mktemp("finished") / "run"))


def copy_of(run: RunFolder, folder: Path) -> RunFolder:
    """Copy a run's files without its checkpoints."""
    copy = RunFolder(folder / "copy")
    copy.path.mkdir()
    for file in run.path.iterdir():
        if file.is_file():
            (copy.path / file.name).write_bytes(file.read_bytes())
    return copy


def step_at_peak(run: RunFolder) -> dict[str, int]:
    """Return the bytes by category at the peak of the steps after the first one."""
    phases = json.loads(run.memory_json.read_text())["phases"]
    (step,) = (phase["at_peak"] for phase in phases if phase["name"] == "step")
    return {name: int(value) for name, value in step.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_restored_optimizer_states_are_counted(base: Path, tmp_path: Path, optimizer: str) -> None:
    """The first process ends before a step that has optimizer states."""
    sections = {"train": {"optimizer": optimizer}, "adapter": {"rank": 64}}
    whole = train_run(recipe_of(base, tmp_path / "whole", **sections))
    recipe = recipe_of(base, tmp_path / "resumed", **sections)
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=1)
    resumed = train_run(recipe, resume=True)
    found, expected = step_at_peak(resumed), step_at_peak(whole)
    assert found["optimizer"] == pytest.approx(expected["optimizer"], rel=0.01)
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.01)


def test_the_timeline_reaches_each_phase_s_peak_and_numbers_its_steps(finished: RunFolder) -> None:
    result = report.run(finished.path)
    seen: dict[str, int] = {}
    for trace in result.timeline:
        seen[trace.phase] = max(trace.peak_bytes, seen.get(trace.phase, 0))
    assert seen == {phase.name: phase.peak_bytes for phase in result.ledger.phases}
    steps = [trace.step for trace in result.timeline if trace.phase == "step"]
    assert steps[:2] == [2, 3]
    step = timelines.peak_step(result.timeline)
    assert step is not None
    assert [word for _, word in step.marks] == ["forward", "loss", "backward"] * 2 + ["update"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_states_of_the_optimizer_are_planned_from_the_second_step_on(
    base: Path, tmp_path: Path, optimizer: str, steps: int
) -> None:
    train = {"steps": steps, "optimizer": optimizer, "activation_checkpointing": False}
    settings: dict[str, Any] = {"adapter": {"targets": "all", "rank": 64}, "train": train}
    # All rows have the same length, so each step has the same batches.
    ledger = report.run(train_run(recipe_of(base, tmp_path / "run", **settings)).path).ledger
    assert ("step" in {phase.name for phase in ledger.phases}) == (steps > 1)
    assert ledger.measured_peak_bytes == pytest.approx(ledger.planned_peak_bytes, rel=0.002)


def test_the_figures_of_the_report_are_measured(finished: RunFolder) -> None:
    ledger = report.run(finished.path).ledger
    assert 0 < ledger.floor_bytes <= ledger.after.peak_bytes
    cost = ledger.instrument_cost
    assert cost is not None
    assert cost.steps == STEPS
    assert 3 <= cost.tracked_steps < STEPS
    assert cost.tracked_seconds > 0
    assert cost.plain_seconds > 0
    assert 10_000 < cost.record_bytes < 5_000_000
    assert ledger.notes == ()


def test_an_interrupted_run_can_be_reported_and_keeps_its_phases_when_resumed(
    base: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(base, tmp_path / "run")
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=STEPS - 1)
    run = RunFolder(tmp_path / "run")
    stopped = report.run(run.path)
    names = [phase.name for phase in stopped.ledger.phases]
    assert names == ["load", "first_step", "step", "checkpoint"]
    train_run(recipe, resume=True)
    complete = report.run(run.path)
    assert [phase.name for phase in complete.ledger.phases] == [*names, "eval"]
    for earlier, now in zip(stopped.ledger.phases, complete.ledger.phases, strict=False):
        assert now.peak_bytes >= earlier.peak_bytes
    assert complete.timeline[: len(stopped.timeline)] == stopped.timeline
    assert "resumed after step 5" in complete.ledger.notes[0]
    page.render(complete)


def test_a_run_resumed_after_its_last_step_keeps_what_was_measured(
    base: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(base, tmp_path / "run")
    run = train_run(recipe)
    measured = report.run(run.path).ledger
    about = run.read()
    run.write(about | {"status": "failed"})
    train_run(recipe, resume=True)
    again = report.run(run.path).ledger
    assert again.after == measured.after
    assert again.measured_peak_bytes == measured.measured_peak_bytes


@pytest.fixture(scope="module")
def one_step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, bytes]:
    """Return the recipe of a finished run with one step, and its memory.json."""
    recipe = recipe_of(base, tmp_path_factory.mktemp("one") / "run", train={"steps": 1})
    return recipe, train_run(recipe).memory_json.read_bytes()


@pytest.mark.parametrize("left", ["nothing", "damage", "another device's"])
def test_without_earlier_measurements_a_resumed_report_shows_the_plan(
    one_step: tuple[Recipe, bytes], left: str
) -> None:
    recipe, ledger = one_step
    run = RunFolder(Path(recipe.output))
    run.write(run.read() | {"status": "failed"})
    content = json.loads(ledger)
    content["device"]["name"] = "another"
    if left == "nothing":
        run.memory_json.unlink()
    else:
        run.memory_json.write_text("{" if left == "damage" else json.dumps(content))
    train_run(recipe, resume=True)
    result = report.run(run.path)
    assert {phase.name for phase in result.ledger.phases} == {"load", "eval"}
    assert result.ledger.after.source == "planned"
    assert result.ledger.measured_peak_bytes == 0
    assert result.ledger.after.peak_bytes == result.ledger.planned_peak_bytes
    message = " ".join(result.ledger.notes)
    assert "No training step was measured" in message
    assert ("damaged" in message) is (left == "damage")
    page.render(result)


def test_a_run_of_an_older_version_can_be_reported(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    run.timeline_json.unlink()
    content = json.loads(run.memory_json.read_text())
    for key in ("before_planned_bytes", "floor_bytes", "instrument_cost", "notes"):
        del content[key]
    write_json(run.memory_json, content)
    result = report.run(run.path)
    assert result.timeline == ()
    assert result.ledger.instrument_cost is None
    page.render(result)


def test_a_damaged_timeline_is_named(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    run.timeline_json.write_text('{"stretches": [{"phase": "load"}]}')
    with pytest.raises(UsageError) as caught:
        report.run(run.path)
    assert caught.value.where == str(run.timeline_json)


def test_an_incomplete_last_line_is_ignored(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    text = run.metrics.read_text()
    run.metrics.write_text(text + '{"step": 31, "lo')
    result = report.run(run.path)
    assert len(result.metrics) + len(result.evaluations) == len(text.splitlines())


@pytest.mark.parametrize("line", ["[1, 2]", "{}", '{"step": 1}', '{"step":'])
def test_a_damaged_line_is_named(finished: RunFolder, tmp_path: Path, line: str) -> None:
    run = copy_of(finished, tmp_path)
    first, *rest = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([first, line, *rest, ""]))
    with pytest.raises(UsageError, match="damaged") as caught:
        report.run(run.path)
    assert caught.value.where == f"{run.metrics}:2"


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_damaged_run_json_is_named(finished: RunFolder, tmp_path: Path, content: str) -> None:
    run = copy_of(finished, tmp_path)
    run.run_json.write_text(content)
    with pytest.raises(UsageError, match="damaged"):
        page.render(report.run(run.path))


def test_the_printed_object_does_not_contain_the_timeline(finished: RunFolder) -> None:
    content = report.run(finished.path).to_dict()
    assert "timeline" not in content
    json.dumps(content)


@pytest.mark.slow
def test_full_fine_tuning_is_measured_in_a_new_process(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    planned = report.run(run.path).ledger
    full_finetune_baseline.measure(run.path, observer=Silent())
    ledger = report.run(run.path).ledger
    assert ledger.before.source == "measured"
    assert ledger.before_planned_bytes == planned.before.peak_bytes
    assert ledger.before.peak_bytes == pytest.approx(planned.before.peak_bytes, rel=0.03)
    trained = ledger.before.at_peak
    assert trained["optimizer"] == pytest.approx(2 * trained["adapter"], rel=0.01)
    assert ledger.ratio == ledger.before.peak_bytes / ledger.after.peak_bytes
    assert replace(ledger, before=planned.before, before_planned_bytes=0) == planned


def test_a_baseline_that_cannot_fit_is_not_loaded(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    ledger = report.run(run.path).ledger
    huge = MethodPeak("full", "planned", 10**15, {"adapter": 10**15}, bits=16)
    write_json(run.memory_json, replace(ledger, before=huge).to_dict())
    full_finetune_baseline.main(run.path, tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert "the plan needs 909 TiB" in content["does_not_fit"]


def test_an_error_in_the_run_s_files_is_reported(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    about = run.read()
    about["recipe"]["data"]["train"] = str(tmp_path / "gone.jsonl")
    run.write(about)
    full_finetune_baseline.main(run.path, tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert "gone.jsonl" in content["failed"]
    assert content["exit_code"] == 2


def replace_process(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Replace the new process by a shell script; $4 is the result file."""
    shell = folder / "shell"
    shell.write_text(f"#!/bin/sh\n{does}\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("""echo '{"does_not_fit": "it is too large"}' > "$4" """, "it is too large"),
        ("kill -9 $$", "signal 9"),
    ],
)
def test_a_baseline_that_does_not_fit_stays_planned_and_gets_one_note(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, message: str
) -> None:
    run = copy_of(finished, tmp_path)
    was = report.run(run.path).ledger
    replace_process(tmp_path, monkeypatch, does)
    for _ in range(2):
        full_finetune_baseline.measure(run.path, observer=Silent())
    result = report.run(run.path)
    (note,) = result.ledger.notes
    assert "Full fine-tuning was not measured" in note
    assert message in note
    assert replace(result.ledger, notes=()) == was
    assert note in html.unescape(page.render(result))


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("""echo '{"failed": "no rows", "exit_code": 2}' > "$4" """, UsageError, "no rows"),
        ("echo Boom >&2; exit 1", QloraError, "Boom"),
    ],
)
def test_a_crash_of_the_new_process_does_not_change_the_run(
    finished: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    does: str,
    kind: type[QloraError],
    message: str,
) -> None:
    run = copy_of(finished, tmp_path)
    files = {file.name: file.read_bytes() for file in run.path.iterdir()}
    replace_process(tmp_path, monkeypatch, does)
    with pytest.raises(QloraError, match=message) as caught:
        full_finetune_baseline.measure(run.path, observer=Silent())
    assert type(caught.value) is kind
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == files


def test_full_fine_tuning_has_no_baseline(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    ledger = report.run(run.path).ledger
    full = replace(ledger, after=replace(ledger.after, method="full"))
    write_json(run.memory_json, full.to_dict())
    with pytest.raises(UsageError, match="itself"):
        full_finetune_baseline.measure(run.path, observer=Silent())
