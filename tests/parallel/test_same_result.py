"""Several processes train the same adapter as one, and stop and resume together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import Interrupted
from qlora_cli.parallel.processes import DistributedProcesses
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs import optimizer_states
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import last_good_step
from qlora_cli.runs.run import Run
from qlora_cli.train import loop
from qlora_cli.train.step import train_step
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import STEPS, losses, make_bases, recipe_of
from tests.helpers.together import difference, signal_in_step, train_together

pytestmark = pytest.mark.slow

CLOSE = 1e-6


def recipe_in(folder: Path, name: str, **train: Any) -> Recipe:
    """Return a recipe whose third step has one micro-batch of the four of a step.

    It has dropout, two learning rates, weight decay, magnitudes, and gradients that are clipped.
    """
    settings = {"grad_accum": 4, "eval_every": 2, "checkpoint_every": 2, "lr": 1e-3, **train}
    settings |= {"weight_decay": 0.1, "max_grad_norm": 0.05}
    adapter = {"method": "dora", "dropout": 0.2, "lr_ratio": 4.0}
    return recipe_of(folder, folder / name, train=settings, adapter=adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("together"), "llama")


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunFolder:
    """Return the run of one process."""
    return train_run(recipe_in(folder, "alone"))


def record_weights(folder: Path, rank: int) -> None:
    """Write a hash of the trained weights after each step of this process."""

    def recorded(state: Any, *rest: Any) -> Any:
        outcome = train_step(state, *rest)
        digest = hashlib.sha256()
        for parameter in state.trainable.values():
            digest.update(parameter.detach().numpy().tobytes())
        with (folder / f"weights-{rank}").open("a") as file:
            file.write(f"{state.step} {digest.hexdigest()}\n")
        return outcome

    loop.train_step = recorded


@pytest.fixture(scope="module")
def together(folder: Path) -> RunFolder:
    """Return the run of two processes, which record their weights in the same folder."""
    recipe = recipe_in(folder, "together")
    codes = train_together(recipe, prepare=lambda rank: record_weights(folder, rank))
    assert codes == [0, 0]
    return RunFolder(Path(recipe.output))


def test_two_processes_equal_one(together: RunFolder, alone: RunFolder) -> None:
    assert difference(together, alone) < CLOSE
    steps = json.loads((together.path / "run.json").read_text())["steps"]
    assert steps == STEPS
    assert together.steps() == alone.steps()


def test_the_first_process_measures_the_base_for_all(folder: Path) -> None:
    """The inputs of the linears, and which of them need more bits."""
    base = {"bits": "auto", "budget": "142KiB", "scales": "measured"}
    one, two = (
        recipe_of(folder, folder / f"measured-{name}", base=base, train={"steps": 1})
        for name in ("alone", "together")
    )
    assert train_together(two) == [0, 0]
    run, reference = RunFolder(Path(two.output)), train_run(one)
    assert run.importance.read_bytes() == reference.importance.read_bytes()
    bits = Run(run.path).recipe.base.overrides
    assert bits == Run(reference.path).recipe.base.overrides != {}
    assert losses(run)[0][1] == pytest.approx(losses(reference)[0][1], rel=CLOSE)


def test_the_weights_of_all_processes_are_equal_bit_for_bit(
    folder: Path, together: RunFolder
) -> None:
    first, second = ((folder / f"weights-{rank}").read_text().splitlines() for rank in (0, 1))
    assert len(first) == STEPS
    assert first == second


def test_the_ledger_has_every_process_and_shows_the_highest_peak(together: RunFolder) -> None:
    ledger = json.loads(together.memory_json.read_text())
    assert [process["rank"] for process in ledger["processes"]] == [0, 1]
    for phase in ledger["phases"]:
        peaks = [
            other["peak_bytes"]
            for process in ledger["processes"]
            for other in process["phases"]
            if other["name"] == phase["name"]
        ]
        assert phase["peak_bytes"] == max(peaks)
    assert "2 processes" in " ".join(ledger["notes"])
    assert ledger["measured_peak_bytes"] == pytest.approx(ledger["planned_peak_bytes"], rel=0.01)


def test_gradients_that_are_not_added_up_are_noticed(folder: Path, alone: RunFolder) -> None:
    recipe = recipe_in(folder, "control", steps=1, eval_every=None)

    def take_own(self: DistributedProcesses, own: torch.Tensor, complete: torch.Tensor) -> None:
        own.copy_(complete.chunk(self.size)[self.rank])

    def keep_own(_: int) -> None:
        pytest.MonkeyPatch().setattr(DistributedProcesses, "add_parts", take_own)

    assert train_together(recipe, prepare=keep_own) == [0, 0]
    norm, expected = (losses(run)[0][3] for run in (RunFolder(Path(recipe.output)), alone))
    assert abs(norm - expected) / expected > 1000 * CLOSE


def test_a_checkpoint_has_the_optimizer_states_of_each_process(
    tmp_path: Path, together: RunFolder, alone: RunFolder
) -> None:
    folder, complete = together.checkpoint(4), alone.checkpoint(4)
    parts = [f"state-{number:05d}-of-00002.pt" for number in (1, 2)]
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*(path.name for path in complete.iterdir()), *parts])
    common, *own = (
        torch.load(folder / name, weights_only=True)["state"] if name in parts else None
        for name in ("state.pt", *parts)
    )
    assert common is None
    expected = torch.load(complete / "state.pt", weights_only=True)["optimizer"]["state"]
    for index, state in expected.items():
        for key in ("exp_avg", "exp_avg_sq"):
            joined = torch.cat([states[index][key] for states in own if index in states])
            torch.testing.assert_close(joined, state[key].view(-1), rtol=1e-4, atol=1e-8)
    run = RunFolder(shutil.copytree(together.path, tmp_path / "run"))
    (run.checkpoint(STEPS) / parts[1]).unlink()
    notes: list[str] = []
    assert last_good_step(run, notes.append) == 4
    assert parts[1] in notes[0]


def test_a_signal_to_one_process_stops_all_and_other_numbers_of_processes_resume(
    folder: Path, alone: RunFolder
) -> None:
    """One process does the first step, two the second, four the next two, and one the last.

    Two of the four do not see the run's folder, as on another machine.
    """
    recipe = recipe_in(folder, "stopped", checkpoint_every=100)
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=1)
    run = RunFolder(Path(recipe.output))
    for size, last in ((2, 2), (4, 4)):

        def stop(rank: int, last: int = last) -> None:
            if rank == 1:
                signal_in_step(last - 1, signal.SIGINT)
            if rank >= 2:
                optimizer_states._is_visible = lambda _: False

        assert train_together(recipe, size, prepare=stop) == [130] * size
        assert run.read()["status"] == "interrupted"
        assert run.steps()[-1] == last
        assert len(list(run.checkpoint(last).glob("state-*.pt"))) == size
    train_run(recipe, resume=True)
    assert difference(run, alone) < CLOSE


def kill_in_step(rank: int) -> None:
    if rank == 1:
        signal_in_step(3, signal.SIGKILL)


def kill_in_checkpoint(rank: int) -> None:
    """Kill a process when half of its file of a checkpoint is written."""

    def write(content: Any, file: Path) -> None:
        real(content, file)
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    real = optimizer_states.save
    if rank == 1:
        optimizer_states.save = write


def test_a_killed_process_ends_all_and_two_resume(folder: Path, alone: RunFolder) -> None:
    recipe = recipe_in(folder, "killed")
    run = RunFolder(Path(recipe.output))
    for kill in (kill_in_step, kill_in_checkpoint):
        assert train_together(recipe, prepare=kill) == [1, -signal.SIGKILL]
        assert run.read()["status"] == "failed"
        assert run.steps() == [2]
    assert train_together(recipe) == [0, 0]
    assert difference(run, alone) < CLOSE
    assert not list(run.checkpoints.glob(".*"))


def test_a_process_without_optimizer_states_trains_and_evaluates(folder: Path) -> None:
    """Parameters of fewer than 4,096 values are not cut if their states may have 8 bit."""
    recipe = recipe_in(folder, "eight", optimizer="adamw8bit", eval_every=1, steps=2)
    assert train_together(recipe) == [0, 0]
    run = RunFolder(Path(recipe.output))
    parts = [
        torch.load(run.checkpoint(2) / f"state-{number:05d}-of-00002.pt", weights_only=True)
        for number in (1, 2)
    ]
    assert [bool(part["state"]) for part in parts] == [True, False]


def test_all_divide_their_micro_batches_if_one_runs_out_of_memory(
    folder: Path, alone: RunFolder
) -> None:
    settings = {"micro_batch": 2, "grad_accum": 2, "steps": 1, "eval_every": None}
    recipe = recipe_in(folder, "divided", **settings)

    def limit(rank: int) -> None:
        from qlora_cli.tasks.causal import CausalTask

        real = CausalTask.loss

        def loss(self: Any, loaded: Any, batch: Any, *rest: Any) -> Any:
            if rank == 1 and batch.num_tokens > 30:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(self, loaded, batch, *rest)

        CausalTask.loss = loss  # type: ignore[method-assign]

    assert train_together(recipe, prepare=limit) == [0, 0]
    run = RunFolder(Path(recipe.output))
    assert run.read()["memory_shortages"][-1]["parts"] == 2
    assert "process 1" in run.read()["memory_shortages"][0]["reason"]
    # The same rows as in the first step of `alone`; B is still zero, so dropout changes nothing.
    assert losses(run)[0][1] == pytest.approx(losses(alone)[0][1], rel=CLOSE)
