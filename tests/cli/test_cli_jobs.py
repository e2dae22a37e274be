"""The command of each job on the embedded base: its output as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.ledger import Ledger
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.runs.metrics import read_steps
from qlora_cli.units import GIB
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow


def test_plan_reports_the_memory_of_a_job(recipe: Path) -> None:
    outcome = qlora("plan", recipe, "train.micro_batch=1", "--json")
    assert outcome.code == 0
    plan = outcome.json
    assert plan["fits"] is True
    assert Ledger.from_dict(plan["ledger"]).planned_peak_bytes > 0
    assert plan["trainable_parameters"] < plan["total_parameters"]
    assert {"device", "advice", "compare", "adapter_bytes", "seconds"} <= set(plan)


def test_plan_prints_text(recipe: Path) -> None:
    outcome = qlora("plan", recipe)
    assert outcome.out.startswith("Yes, fits on")
    assert "Peak memory of full fine-tuning and of this job" not in outcome.out
    outcome = qlora("plan", recipe, "--details")
    assert "fits on" in outcome.out
    assert "Peak memory of full fine-tuning and of this job" in outcome.out


def test_plan_reports_a_missing_data_file(recipe: Path) -> None:
    outcome = qlora("plan", recipe, "data.train=nope.jsonl", "--json")
    assert outcome.code == 2
    assert outcome.json["data_problem"].startswith("data.train: no file nope.jsonl")
    assert "error: data.train: no file nope.jsonl" in outcome.err
    assert outcome.json["time"]["source"].startswith("estimated from the speed of single operati")
    assert outcome.json["disk"]["run_bytes"] > outcome.json["adapter_bytes"]


def test_plan_compares_methods(recipe: Path) -> None:
    compared = qlora("plan", recipe, "--compare", "--json").json["compare"]
    peaks = {(entry["method"], entry["bits"]): entry["peak_bytes"] for entry in compared}
    assert peaks["full", 16] > peaks["lora", 4]
    assert all(sum(entry["at_peak"].values()) == entry["peak_bytes"] for entry in compared)


def test_plan_exits_3_with_advice_if_the_gpu_is_too_small(job_recipe: Path) -> None:
    """Smaller than the CUDA context, so that no advice is enough."""
    outcome = qlora("plan", job_recipe, "--vram", "64MiB", "--json")
    assert outcome.code == 3
    plan = outcome.json
    assert plan["fits"] is False
    assert plan["usable_bytes"] == 0
    assert plan["advice"]
    assert all(advice["saves_bytes"] > 0 for advice in plan["advice"])
    assert not any(advice["fits"] for advice in plan["advice"])
    text = qlora("plan", job_recipe, "--vram", "1MiB").out
    assert text.startswith("No, DOES NOT FIT")
    assert "A GPU with 8 GiB (such as RTX 4060) would do." in text


def test_plan_finds_the_largest_settings_that_fit(recipe: Path) -> None:
    plan = qlora("plan", recipe, "--fit", "--vram", "1GiB", "--json").json
    limits = {item["change"].partition("=")[0]: item["limit"] for item in plan["advice"]}
    assert limits.keys() == {"data.seq_len", "train.micro_batch"}
    assert limits["data.seq_len"] == "model"
    assert all(item["seconds_per_token"] > 0 for item in plan["advice"])


def test_vram_plans_for_a_gpu_that_is_not_present(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.jobs import plan

    profiles: list[DeviceProfile | None] = []
    real = plan.run

    def watched(*args: object, device_profile: DeviceProfile | None, **rest: object) -> object:
        profiles.append(device_profile)
        return real(*args, device_profile=device_profile, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "run", watched)
    outcome = qlora("plan", recipe, "--vram", "24GiB", "--json")
    assert outcome.code == 0
    assert outcome.json["device"]["imagined"] is True  # words: allow
    gpu = ("cuda", "a planned GPU", 24 * GIB, (8, 9), 128)
    assert profiles == [DeviceProfile(*gpu, context_bytes=GIB // 2, is_planned=True)]


def test_train_writes_a_complete_run(run: Path) -> None:
    files = {"run.json", "memory.json", "timeline.json", "metrics.jsonl"}
    files |= {"adapter", "report.html", "memory.png"}
    assert files <= {path.name for path in run.iterdir()}
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert len(read_steps(run / "metrics.jsonl")) == 3


def test_train_refuses_a_folder_in_use(run: Path, recipe: Path) -> None:
    before = (run / "memory.json").read_bytes()
    outcome = qlora("train", recipe)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert (run / "memory.json").read_bytes() == before


def test_train_prints_its_result_on_stdout_and_progress_on_stderr(
    recipe: Path, tmp_path: Path
) -> None:
    outcome = qlora("train", recipe, f"output={tmp_path / 'run'}", "train.steps=1", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 1
    keys = {"run", "train_loss", "eval_loss", "best_step", "tokens_per_second", "ledger"}
    assert keys <= set(outcome.json)
    assert "step 1 of 1" in outcome.err


def test_train_resumes_a_run(recipe: Path, run: Path) -> None:
    outcome = qlora("train", recipe, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 3


def test_train_refuses_a_faulty_recipe_with_every_problem(recipe: Path) -> None:
    outcome = qlora("train", recipe, "train.lrr=1", "base.bits=5")
    assert outcome.code == 2
    assert "override train.lrr=1: unknown setting" in outcome.err
    assert "override base.bits=5: is 5; it must be auto, 4, 8 or 16" in outcome.err


def test_report_shows_a_run(run: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "memory.png"
    outcome = qlora("report", run, "--html", page, "--png", picture)
    assert outcome.code == 0, outcome.err
    assert "done" in outcome.out
    assert "of the peak, other" in outcome.out
    assert picture.read_bytes() == (run / "memory.png").read_bytes()
    assert "less peak memory than full fine-tuning" in page.read_text()
    shown = qlora("report", run, "--json").json
    assert len(shown["metrics"]) == 3
    assert shown["html"] is None


@pytest.mark.slow
def test_report_measures_full_fine_tuning(trained_recipe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained_recipe.parent / "run", copy)
    outcome = qlora("report", copy, "--measure-before", "--json")
    assert outcome.code == 0, outcome.err
    ledger = outcome.json["ledger"]
    assert ledger["before"]["source"] == "measured"
    assert ledger["before_planned_bytes"] > 0
    assert "full fine-tuning (measured)" in (copy / "report.html").read_text()


def test_merge_reports_what_it_wrote(merged: Path, run: Path, tmp_path: Path) -> None:
    assert (merged / "config.json").is_file()
    out = tmp_path / "again"
    arguments = ("--dtype", "float32", "--base", "original", "--json")
    outcome = qlora("merge", run, "--out", out, *arguments)
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert (result["dtype"], result["base"], result["out"]) == ("float32", "original", str(out))
    files = out.glob("*.safetensors")
    assert result["bytes"] <= sum(path.stat().st_size for path in files)


def test_verify_passes_a_correct_merge(merged: Path, run: Path) -> None:
    outcome = qlora("verify", merged, "--against", run, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["passed"] is True
    assert {"max_logit_difference", "mean_kl", "top1_agreement", "faults"} <= set(outcome.json)


def test_verify_exits_4_on_another_model(
    trained_recipe: Path, job_recipe: Path, tmp_path: Path
) -> None:
    assert qlora("train", job_recipe, "train.lr=0.05", "train.steps=2").code == 0
    assert qlora("merge", job_recipe.parent / "run", "--out", tmp_path / "merged").code == 0
    run = trained_recipe.parent / "run"
    outcome = qlora("verify", tmp_path / "merged", "--against", run)
    assert outcome.code == 4
    assert "FAILED" in outcome.out


def test_generate_continues_a_prompt(run: Path, merged: Path) -> None:
    arguments = ("--prompt", "name: Copper Swan", "--max-new-tokens", "5")
    for model in (run, merged, "starter"):
        outcome = qlora("generate", model, *arguments, "--json")
        assert outcome.code == 0, outcome.err
        assert outcome.json["prompt"] == "name: Copper Swan"
        assert outcome.json["text"]
    sampled = [
        qlora("generate", run, *arguments, "--temperature", "1.5", "--seed", "3").out
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


def test_chat_answers_until_an_empty_line(run: Path) -> None:
    outcome = qlora("chat", run, stdin="Hello\nAgain\n\nnever read\n")
    assert outcome.code == 0, outcome.err
    assert outcome.out
    assert ">" not in outcome.out


def test_eval_measures_held_out_rows(run: Path, held_out: Path) -> None:
    outcome = qlora("eval", run, "--data", held_out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert result["tokens"] > 0
    assert result["perplexity"] == pytest.approx(2.718281828 ** result["loss"], rel=1e-3)
    assert 0 <= result["accuracy"] <= 1


def test_data_shows_rows_as_tokens(recipe: Path) -> None:
    outcome = qlora("data", recipe, "--show", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("⟦") >= 2 + 1
    result = qlora("data", recipe, "data.packing=false", "--json").json
    assert result["rows"] == 64
    assert len(result["shown"]) == 3


def test_doctor_checks_this_machine() -> None:
    outcome = qlora("doctor", "--json")
    assert outcome.code == 0
    states = {check["name"]: check["state"] for check in outcome.json["checks"]}
    assert states["4 bit (NF4)"] == states["8 bit (LLM.int8())"] == "ok"
    assert states["torch"] == "ok"
    assert "device" in qlora("doctor").out


@pytest.mark.slow
def test_quickstart_runs_all_jobs_twice_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped recipe with 40 instead of 300 steps, in which the loss falls to half.

    The second run has two steps.
    """
    from qlora_cli.jobs import quickstart

    shorter = tmp_path / "starter.yaml"
    shipped = find_recipe(quickstart.RECIPE).read_text()
    assert "steps: 300" in shipped
    monkeypatch.setattr(quickstart, "RECIPE", str(shorter))
    results = []
    for steps in (40, 2):
        shorter.write_text(shipped.replace("steps: 300", f"steps: {steps}"))
        outcome = qlora("quickstart", "--out", tmp_path / "quickstart", "--json")
        assert outcome.code == 0, outcome.err
        results.append(outcome.json)
    assert results[0]["loss_after"] <= results[0]["loss_before"] / 2
    for result in results:
        assert result["verify"]["passed"] is True
        assert result["samples"]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_tables_of_a_plan_have_the_width_of_the_variable_columns(
    columns: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = qlora("plan", recipe, "--compare", "--vram", "24GiB").out.splitlines()
    table = lines[lines.index("Peak memory of each method, on the same data and batch size") :]
    assert max(map(len, table)) <= int(columns)
    labels = {line.split("  ")[0].strip() for line in table}
    assert {"base", "quantization constants", "gradients", "activations", "full / this"} <= labels
