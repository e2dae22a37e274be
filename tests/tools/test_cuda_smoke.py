"""tools/validation/cuda_smoke.py finds each fault of a CUDA run; its sparse checkpoint is valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cuda_smoke
import pytest
import torch
from cuda_smoke import SmokeCase, check_run
from plan_cases import Case

from qlora_cli.files.atomic import write_json
from qlora_cli.memory.ledger import Allocator, Device, Ledger, Phase
from qlora_cli.models.build import skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.recipe.base import Bits
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Optimizer
from qlora_cli.runs.layout import RunFolder
from tests.helpers.families import MODEL_TYPES
from tests.helpers.results import AFTER_LOAD, LEDGER, STEP

PEAK = sum(STEP.values())
PEAKS = {"allocated": PEAK, "reserved": PEAK + 1000}
RESULT = {"steps": 3}


def phase(name: str, at_peak: dict[str, int]) -> Phase:
    return Phase(name, sum(at_peak.values()), sum(AFTER_LOAD.values()), at_peak)


COMPLETE = replace(
    LEDGER,
    phases=(phase("load", AFTER_LOAD), phase("first_step", STEP), phase("eval", AFTER_LOAD)),
    allocator=Allocator(*PEAKS.values(), 0),
    planned_peak_bytes=PEAK,
    measured_peak_bytes=PEAK,
)
UNATTRIBUTED = STEP | {"activations": STEP["activations"] // 2, "other": STEP["activations"] // 2}


def run_with(folder: Path, ledger: Ledger) -> RunFolder:
    run = RunFolder(folder)
    run.create()
    run.write({"status": "done"})
    run.adapter.mkdir()
    run.report.touch()
    run.metrics.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)))
    write_json(run.memory_json, ledger.to_dict())
    return run


def test_a_complete_run_has_no_fault(tmp_path: Path) -> None:
    assert check_run(run_with(tmp_path / "run", COMPLETE), RESULT, PEAKS, 3)["faults"] == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"allocator": Allocator(PEAK - 1, PEAK + 1000, 0)}, "the allocator"),
        ({"allocator": Allocator(PEAK, PEAK, 0)}, "the allocator"),
        ({"measured_peak_bytes": PEAK + 1}, "not the allocator's peak"),
        ({"planned_peak_bytes": PEAK * 104 // 100}, "the error of the plan is +4.00%"),
        ({"planned_peak_bytes": PEAK * 98 // 100}, "the error of the plan is -2.00%"),
        ({"device": Device("cpu", "", 0)}, "device is cpu"),
        ({"phases": COMPLETE.phases[:2]}, "phases are load, first_step"),
        (
            {"phases": (COMPLETE.phases[0], phase("first_step", UNATTRIBUTED), COMPLETE.phases[2])},
            "too few bytes are attributed",
        ),
    ],
)
def test_a_fault_of_the_ledger_is_found(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    run = run_with(tmp_path / "run", replace(COMPLETE, **changes))
    faults = check_run(run, RESULT, PEAKS, 3)["faults"]
    assert any(fault in found for found in faults), faults


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda run: run.adapter.rmdir(), "no trained weights"),
        (lambda run: run.report.unlink(), "no report"),
        (lambda run: run.write({"status": "failed"}), "the status in run.json is failed"),
        (
            lambda run: run.metrics.write_text('{"step": 1, "loss": 1.0}\n'),
            "1 lines of metrics, 3 steps",
        ),
    ],
)
def test_a_fault_of_the_folder_is_found(
    tmp_path: Path, spoil: Callable[[RunFolder], None], fault: str
) -> None:
    run = run_with(tmp_path / "run", COMPLETE)
    spoil(run)
    assert check_run(run, RESULT, PEAKS, 3)["faults"] == [fault]


def test_a_sparse_checkpoint_takes_no_disk_space(tmp_path: Path) -> None:
    job = SmokeCase(Case("gpt2", "tiny", ("data.seq_len=64",), 8192), is_sparse=True)
    words = job.write(tmp_path)
    recipe = load_recipe(words[1])
    assert recipe.train.steps == 3
    file = Path(recipe.model.name) / "model.safetensors"
    assert file.stat().st_size > 10 * 512 * file.stat().st_blocks
    model, family = skeleton(job.case.config(), torch.float16)
    source = open_source(file.parent, family)
    for name in source.names():
        assert source.shape(name) == model.get_parameter(name).shape
        assert not source.read(name).any()


def test_rows_have_the_requested_length(tmp_path: Path) -> None:
    rows = [
        json.loads(line)
        for line in cuda_smoke.write_rows(tmp_path / "rows.jsonl", 64, 100).read_text().splitlines()
    ]
    assert max(len(row["input_ids"]) for row in rows) == 64
    assert all(0 <= token < 100 for row in rows for token in row["input_ids"])


def test_every_family_bit_optimizer_and_method_is_covered() -> None:
    recipes = [job.case.recipe() for job in cuda_smoke.smoke_cases()]
    assert {job.case.family for job in cuda_smoke.smoke_cases()} == set(MODEL_TYPES)
    assert {recipe.base.bits for recipe in recipes} == set(get_args(Bits))
    assert {recipe.train.optimizer for recipe in recipes} == set(get_args(Optimizer))
    assert {recipe.adapter.method for recipe in recipes} == {"lora", "full"}
    assert {recipe.adapter.dtype for recipe in recipes} == {"float16", "float32"}
    assert {recipe.train.activation_checkpointing for recipe in recipes} == {True, False}
