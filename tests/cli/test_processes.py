"""`qlora train --processes` and `accelerate launch`, each in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.files.safetensors_io import read_header, read_tensor
from qlora_cli.jobs.process_start import check_processes
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.metrics import read_steps
from tests.helpers.cli_helpers import qlora


def test_the_option_is_refused_inside_another_launcher(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    outcome = qlora("train", job_recipe, "--processes", "2", "--json")
    assert outcome.code == 2
    assert "another launcher" in outcome.json["error"]["what"]


def test_a_step_with_too_few_micro_batches_is_refused() -> None:
    recipe = Recipe.model_validate(
        {"model": {"name": "starter"}, "data": {"train": "rows"}, "train": {"grad_accum": 3}}
    )
    check_processes(recipe, 3)
    with pytest.raises(UsageError, match="a step has 3 micro-batches, and 4 processes share them"):
        check_processes(recipe, 4)
    sharded = with_settings(recipe, "base", residency="shard")
    check_processes(sharded, 2)
    with pytest.raises(UsageError, match=r"^base\.residency: shard shares the base among several"):
        check_processes(sharded, 1)
    initialized = with_settings(recipe, "adapter", init="pissa")
    check_processes(initialized, 1)
    with pytest.raises(UsageError, match="init: pissa needs one process, and there are 2"):
        check_processes(initialized, 2)
    automatic = with_settings(recipe, "train", micro_batch="auto")
    check_processes(automatic, 1)
    with pytest.raises(UsageError, match="micro_batch"):
        check_processes(automatic, 2)


def run(*words: str | Path) -> subprocess.Popen[bytes]:
    """Start a command in a Python of its own, without other output than stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def values_of(run_folder: Path) -> tuple[list[float], list[Any]]:
    entries, _ = read_header(run_folder / "adapter" / "adapter_model.safetensors")
    steps = [line["loss"] for line in read_steps(run_folder / "metrics.jsonl")]
    return steps, [read_tensor(entries[name]) for name in sorted(entries)]


@pytest.mark.slow
def test_stopped_with_two_processes_and_resumed_by_accelerate_launch(job_recipe: Path) -> None:
    """Ctrl-C stops all; the resumed run equals one of a single process."""
    folder = job_recipe.parent
    settings = ("train.grad_accum=4", "train.steps=6", "train.checkpoint_every=100")
    together = ("train", job_recipe, *settings, f"output={folder}/together")
    process = run("qlora_cli", *together, "--processes", "2")
    metrics = folder / "together" / "metrics.jsonl"
    while process.poll() is None and not metrics.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate()
    assert process.returncode == 130, shown.decode()
    assert b"stopped after step" in shown

    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    process = run(*launch, "-m", "qlora_cli", *together, "--resume", "--json")
    printed, shown = process.communicate()
    assert process.returncode == 0, shown.decode()
    assert json.loads(printed)["steps"] == 6

    assert qlora("train", job_recipe, *settings, f"output={folder}/alone").code == 0
    losses, weights = values_of(folder / "together")
    expected, wanted = values_of(folder / "alone")
    assert losses == pytest.approx(expected, rel=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(weights, wanted, strict=True)) < 1e-6


def test_a_plan_for_several_devices_is_that_of_each_process(job_recipe: Path) -> None:
    words = ("plan", job_recipe, "train.grad_accum=2", "--json")
    alone = qlora(*words, "--vram", "24GiB").json
    together = qlora(*words, "--devices", "2x24GiB").json
    assert "count" not in alone["device"]
    assert together["device"]["count"] == 2
    assert "each of 2 devices" in " ".join(together["notes"])
    shown = qlora(*words[:-1], "--devices", "2x24GiB").out
    assert shown.startswith("Yes, fits on each of 2 devices, a planned GPU (24.0 GiB): ")
    # Each process has one micro-batch in a step, so no gradient exists during its forward pass.
    peaks = [plan["ledger"]["planned_peak_bytes"] for plan in (alone, together)]
    assert peaks[1] <= peaks[0]


def test_devices_that_are_not_understood_are_refused(job_recipe: Path) -> None:
    both = qlora("plan", job_recipe, "--devices", "2x24GiB", "--vram", "24GiB")
    assert (both.code, "two different GPUs" in both.err) == (2, True)
    for text in ("24GiB", "0x24GiB", "2xnothing"):
        outcome = qlora("plan", job_recipe, "--devices", text)
        assert (outcome.code, "--devices" in outcome.err) == (2, True)
