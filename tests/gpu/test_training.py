"""Training of the embedded base on the GPU: the loss falls, and ledger and merge are right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.events import Silent
from qlora_cli.jobs import train
from qlora_cli.jobs.results import TrainResult
from qlora_cli.memory.ledger import Ledger
from qlora_cli.recipe.load import load_recipe
from qlora_cli.runs.metrics import read_steps
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
STEPS = 60
SETTINGS = [f"train.steps={STEPS}", "train.checkpoint_every=1000"]
ATTRIBUTED = 0.99
"""Share of each phase's peak that must be attributed to a category other than `other`."""


MEASURED = """
import json, sys, torch
from qlora_cli.events import Silent
from qlora_cli.jobs import train
from qlora_cli.recipe.load import load_recipe

peaks, reserved = [], []

class Counters(Silent):
    def step(self, event):
        peaks.append(torch.cuda.max_memory_allocated())
        reserved.append(torch.cuda.max_memory_reserved())

recipe = load_recipe("starter", sys.argv[1:])
ledger = train.run(recipe, recipe_path=None, resume=False, observer=Counters()).ledger
print(json.dumps({"ledger": ledger.to_dict(), "peaks": peaks, "reserved": reserved}))
"""
"""Script that trains in a process of its own, without memory of other tests, and reads the GPU's
counters after each step."""


@pytest.fixture(scope="module")
def trained(session_gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    settings = [*SETTINGS, f"output={tmp_path_factory.mktemp('trained') / 'run'}"]
    recipe = load_recipe("starter", settings)
    return train.run(recipe, recipe_path=None, resume=False, observer=Silent())


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_steps(run / "metrics.jsonl")]


def test_the_loss_falls(
    trained: TrainResult, record_property: Callable[[str, object], None]
) -> None:
    values = losses(trained.run)
    assert len(values) == STEPS
    first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
    record_property("losses_first_and_last_5", [first, last])
    record_property("tokens_per_second", trained.tokens_per_second)
    assert last < first / 2


def test_the_first_loss_is_the_same_on_gpu_and_cpu(trained: TrainResult, tmp_path: Path) -> None:
    """Before the first update both compute the same loss, up to 16-bit rounding."""
    about = json.loads((trained.run / "run.json").read_text())
    assert about["device"]["kind"] == "cuda"
    dtype = getattr(torch, about["recipe"]["base"]["compute_dtype"])
    on_cpu = first_loss_on_cpu(tmp_path, about["recipe"]["base"]["compute_dtype"])
    eps = torch.finfo(dtype).eps
    assert losses(trained.run)[0] == pytest.approx(on_cpu, rel=4 * eps)


def first_loss_on_cpu(folder: Path, compute: str) -> float:
    """Return the loss of the same first batch, computed on the CPU."""
    from qlora_cli.device import DeviceProfile
    from qlora_cli.jobs.prepare import prepare, read_job
    from qlora_cli.train.state import build_state
    from qlora_cli.train.step import train_step

    settings = [*SETTINGS, f"output={folder / 'cpu'}", f"base.compute_dtype={compute}"]
    prepared = prepare(load_recipe("starter", settings), DeviceProfile("cpu", "a CPU", 2**34))
    job = read_job(prepared)
    state = build_state(prepared.request(CPU, Silent()))
    return train_step(state, job.schedule.step_batches(0), 0.0).loss


@pytest.mark.parametrize(
    "settings",
    [[], ["base.bits=8", "base.outlier_threshold=0"], ["base.bits=16"]],
    ids=["4 bit", "8 bit", "16 bit"],
)
def test_the_ledger_equals_the_allocators_counters(
    counting_gpu: torch.device,
    tmp_path: Path,
    root: Path,
    settings: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    found = measured(root, "train.steps=6", f"output={tmp_path / 'run'}", *settings)
    peaks, ledger = found["peaks"], Ledger.from_dict(found["ledger"])
    phases = {phase.name: phase for phase in ledger.phases}
    assert phases["first_step"].peak_bytes == peaks[0]
    assert phases["step"].peak_bytes == max(peaks[1:])
    assert ledger.measured_peak_bytes == max(phase.peak_bytes for phase in ledger.phases)
    assert ledger.allocator.allocated == ledger.measured_peak_bytes
    assert ledger.allocator.reserved >= max(found["reserved"])
    assert ledger.allocator.driver >= ledger.allocator.reserved
    shares = {
        name: 1 - phase.at_peak.get("other", 0) / phase.peak_bytes for name, phase in phases.items()
    }
    record_property("attributed", shares)
    print({name: f"{share:.2%}" for name, share in shares.items()})
    assert min(shares[name] for name in ("load", "first_step", "step", "eval")) >= ATTRIBUTED


def measured(root: Path, *settings: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *settings],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def test_merge_and_verify(
    trained: TrainResult, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    merged = qlora("merge", trained.run, "--out", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    verified = qlora("verify", tmp_path / "merged", "--against", trained.run, "--json")
    record_property("verify", verified.out.strip())
    assert verified.code == 0, verified.err
    assert verified.json["passed"] is True
    assert verified.json["faults"] == []


def test_a_changed_merge_fails_the_verification(trained: TrainResult, tmp_path: Path) -> None:
    """Verification on the GPU fails if one matrix is wrong by a tenth."""
    from safetensors.torch import load_file, save_file

    assert qlora("merge", trained.run, "--out", tmp_path / "merged").code == 0
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] *= 1.1
    save_file(tensors, file, metadata={"format": "pt"})
    refused = qlora("verify", tmp_path / "merged", "--against", trained.run, "--json")
    assert refused.code == 4, refused.err
    assert refused.json["passed"] is False
