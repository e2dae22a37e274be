"""The embedded base trained on a card: it learns, the ledger is right, and so is the merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from qlora_cli.events import Silent, StepEvent
from qlora_cli.jobs import train
from qlora_cli.jobs.results import TrainResult
from qlora_cli.memory.ledger import Ledger
from qlora_cli.recipe.load import load_recipe
from tests.commandline import qlora
from tests.runs import CPU

pytestmark = pytest.mark.gpu
STEPS = 60
SETTINGS = [f"train.steps={STEPS}", "train.checkpoint_every=1000"]
ATTRIBUTED = 0.99
"""Of each phase's peak, by the names of the ledger; the rest is `other`."""


@dataclass
class Counters(Silent):
    """What the card's own counters say after each step, read beside the job."""

    peaks: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)

    def step(self, event: StepEvent) -> None:
        self.peaks.append(torch.cuda.max_memory_allocated())
        self.reserved.append(torch.cuda.max_memory_reserved())


def run_starter(folder: Path, *settings: str) -> tuple[TrainResult, Counters]:
    recipe = load_recipe("starter", [*SETTINGS, *settings, f"output={folder / 'run'}"])
    counters = Counters()
    return train.run(recipe, recipe_path=None, resume=False, observer=counters), counters


@pytest.fixture(scope="module")
def trained(checked_card: torch.device, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run_starter(tmp_path_factory.mktemp("trained"))[0]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls(
    trained: TrainResult, record_property: Callable[[str, object], None]
) -> None:
    seen = losses(trained.run)
    assert len(seen) == STEPS
    first, last = sum(seen[:5]) / 5, sum(seen[-5:]) / 5
    record_property("losses_first_and_last_5", [first, last])
    record_property("tokens_per_second", trained.tokens_per_second)
    assert last < first / 2


def test_a_card_and_the_host_learn_the_same(trained: TrainResult, tmp_path: Path) -> None:
    """Before the first update both computed the same loss, to the rounding of 16 bit."""
    about = json.loads((trained.run / "run.json").read_text())
    assert about["device"]["kind"] == "cuda"
    dtype = getattr(torch, about["recipe"]["base"]["compute_dtype"])
    on_host = first_loss_on_host(tmp_path, about["recipe"]["base"]["compute_dtype"])
    eps = torch.finfo(dtype).eps
    assert losses(trained.run)[0] == pytest.approx(on_host, rel=4 * eps)


def first_loss_on_host(folder: Path, compute: str) -> float:
    """The same first window, without a card."""
    from qlora_cli.jobs.prepare import prepare, read_job
    from qlora_cli.recipe.resolve import DeviceFacts
    from qlora_cli.train.state import build_state
    from qlora_cli.train.step import train_step

    settings = [*SETTINGS, f"output={folder / 'host'}", f"base.compute_dtype={compute}"]
    prepared = prepare(load_recipe("starter", settings), DeviceFacts("cpu", "a host", 2**34))
    job = read_job(prepared)
    state = build_state(
        prepared.recipe, prepared.config, prepared.source, CPU, Silent(), prepared.file_dtype
    )
    return train_step(state, job.windows.window(0), 0.0).loss


@pytest.mark.parametrize(
    "settings",
    [[], ["base.bits=8", "base.outlier_threshold=0"], ["base.bits=16"]],
    ids=["4 bit", "8 bit", "16 bit"],
)
def test_the_ledger_is_the_allocators(
    empty_card: torch.device,
    tmp_path: Path,
    settings: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    result, counters = run_starter(tmp_path, "train.steps=6", *settings)
    ledger: Ledger = result.ledger
    phases = {phase.name: phase for phase in ledger.phases}
    assert phases["first_step"].peak_bytes == counters.peaks[0]
    assert phases["step"].peak_bytes == max(counters.peaks[1:])
    assert ledger.measured_peak_bytes == max(phase.peak_bytes for phase in ledger.phases)
    assert ledger.allocator.allocated == ledger.measured_peak_bytes
    assert ledger.allocator.reserved >= max(counters.reserved)
    assert ledger.allocator.driver >= ledger.allocator.reserved
    shares = {
        name: 1 - phase.at_peak.get("other", 0) / phase.peak_bytes for name, phase in phases.items()
    }
    record_property("attributed", shares)
    print({name: f"{share:.2%}" for name, share in shares.items()})
    assert min(shares[name] for name in ("load", "first_step", "step", "eval")) >= ATTRIBUTED


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


def test_a_changed_merge_is_refused(trained: TrainResult, tmp_path: Path) -> None:
    """The proof is one on a card, too: one matrix off by a tenth, and it fails."""
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
