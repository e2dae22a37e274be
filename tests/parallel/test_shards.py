"""A base and an adapter that are sharded over processes give the result of complete ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import Interrupted, NotFinite
from qlora_cli.events import Silent
from qlora_cli.jobs import evaluate
from qlora_cli.jobs.results import EvalResult
from qlora_cli.models.placement.block_shards import BlockShards
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_evaluations
from qlora_cli.train.sharded_parameters import ShardedParameters
from tests.helpers.interrupted import train_run
from tests.helpers.moe import make_moe
from tests.helpers.resumed_runs import make_bases, recipe_of
from tests.helpers.runs import make_base
from tests.helpers.together import difference, signal_in_step, train_together

pytestmark = pytest.mark.slow

CLOSE = 1e-6


def recipe_in(folder: Path, name: str, base: dict[str, Any], **train: Any) -> Recipe:
    """Return a recipe whose third step has one micro-batch of the four of a step.

    It has dropout, two learning rates, weight decay, and gradients that are clipped. The last block
    keeps its activations, so its weights are complete in each process.
    """
    settings = {"grad_accum": 4, "eval_every": 3, "lr": 1e-3, "activation_checkpointing": 3}
    settings |= {"weight_decay": 0.1, "max_grad_norm": 0.05, **train}
    adapter = {"dropout": 0.2, "rank": 32, "lr_ratio": 2.0}
    return recipe_of(folder, folder / name, "wide", train=settings, base=base, adapter=adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows and a base whose weights need more memory than the loss."""
    folder = make_bases(tmp_path_factory.mktemp("shards"))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    make_base(folder / "wide", "llama", spread=0.05, **sizes)
    return folder


def assert_planned(run: RunFolder, processes: int) -> None:
    """Assert that each process' peak is the planned one, except for the rows of a step."""
    ledger = json.loads(run.memory_json.read_text())
    assert len(ledger["processes"]) == processes
    for process in ledger["processes"]:
        peak = max(phase["peak_bytes"] for phase in process["phases"])
        assert peak == pytest.approx(ledger["planned_peak_bytes"], rel=0.0012)


def bytes_in_step(phases: list[dict[str, Any]], category: str) -> int:
    """Return the bytes of a category at the peak of a step."""
    (step,) = (phase for phase in phases if phase["name"] == "step")
    return int(step["at_peak"][category])


def assert_divided(run: RunFolder, alone: RunFolder) -> None:
    """Assert that each process has its share of the optimizer states of one process."""
    ledger, complete = (json.loads(item.memory_json.read_text()) for item in (run, alone))
    own = [bytes_in_step(process["phases"], "optimizer") for process in ledger["processes"]]
    total = bytes_in_step(complete["phases"], "optimizer")
    assert sum(own) == pytest.approx(total, rel=0.01)
    assert max(own) == pytest.approx(total / len(own), rel=0.01)


def assert_adapter_divided(run: RunFolder, alone: RunFolder) -> None:
    """Assert that each process has its share of the adapter of three of four blocks.

    It has the adapter of the fourth block, and two buffers for the adapter of one block, too.
    """
    ledger, complete = (json.loads(item.memory_json.read_text()) for item in (run, alone))
    block = bytes_in_step(complete["phases"], "adapter") / 4
    for process in ledger["processes"]:
        expected = block * (3 / len(ledger["processes"]) + 1 + 2)
        assert bytes_in_step(process["phases"], "adapter") == pytest.approx(expected, rel=0.001)


def evaluated(run: RunFolder) -> float:
    """Return the held-out loss of a run, computed by one process."""
    rows = run.path.parent / "rows.jsonl"
    result = evaluate.run(str(run.path), data=str(rows), observer=Silent())
    assert isinstance(result, EvalResult)
    return result.loss


def trained_together(recipe: Recipe, size: int) -> RunFolder:
    assert train_together(recipe, size) == [0] * size
    return RunFolder(Path(recipe.output))


def of_experts(folder: Path, name: str, base: dict[str, Any]) -> Recipe:
    """Return a recipe with adapters on attention and experts. The first block is recomputed."""
    train = {"grad_accum": 2, "activation_checkpointing": 1, "eval_every": None}
    adapter = {"targets": ["q", "v", "experts"]}
    return recipe_of(folder, folder / name, "moe", train=train, base=base, adapter=adapter)


def test_sharding_gives_the_bits_of_a_complete_base(folder: Path) -> None:
    """Each process has one micro-batch per step, so gradients are added in the same order."""
    # The first run keeps a packed copy, which its other process and the second run read.
    mixed = {"overrides": {"down": 8, "q": 16}, "cache": True}
    sharded = {"residency": "shard"}
    complete = trained_together(recipe_in(folder, "complete", mixed, grad_accum=2), 2)
    run = trained_together(recipe_in(folder, "mixed", sharded | mixed, grad_accum=2), 2)
    assert difference(run, complete) == 0.0
    assert_planned(run, 2)
    assert evaluated(run) == pytest.approx(read_evaluations(run.metrics)[-1].loss, rel=CLOSE)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_sharded_experts_have_the_bits_of_complete_ones(folder: Path, optimizer: str) -> None:
    """Also with 8-bit states, whose pieces are cut at other values."""
    make_moe(folder / "moe", "mixtral")
    runs = []
    for residency in ("device", "shard"):
        recipe = of_experts(folder, f"{residency}-{optimizer}", {"residency": residency})
        recipe = with_settings(recipe, "train", optimizer=optimizer)
        runs.append(trained_together(recipe, 2))
    assert difference(*runs) == 0.0


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunFolder:
    return train_run(recipe_in(folder, "alone", {}))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_the_base_equal_one(folder: Path, alone: RunFolder, size: int) -> None:
    """Each of two processes adds the sums of two micro-batches per step."""
    run = trained_together(recipe_in(folder, f"sharded-{size}", {"residency": "shard"}), size)
    assert difference(run, alone) < CLOSE
    assert_planned(run, size)
    assert_divided(run, alone)
    assert_adapter_divided(run, alone)


def test_other_numbers_of_processes_resume(folder: Path, alone: RunFolder) -> None:
    """Two do the first two steps, four the third, one the fourth, and two the last one."""
    recipe = recipe_in(folder, "resumed", {"residency": "shard"}, checkpoint_every=100)
    run = RunFolder(Path(recipe.output))
    for size, last in ((2, 2), (4, 3)):

        def stop(rank: int, last: int = last) -> None:
            if rank == 1:
                signal_in_step(last - 1, signal.SIGINT)

        assert train_together(recipe, size, prepare=stop) == [130] * size
        assert run.steps()[-1] == last
    with pytest.raises(Interrupted):
        train_run(with_settings(recipe, "base", residency="device"), resume=True, stop_after=4)
    assert train_together(recipe) == [0, 0]
    assert run.steps() == [2, 3, 4, 5]
    assert difference(run, alone) < CLOSE


def all_recomputed(folder: Path, name: str) -> Recipe:
    return recipe_in(folder, name, {"residency": "shard"}, activation_checkpointing=True)


def test_a_buffer_that_is_used_again_too_early_is_noticed(folder: Path, alone: RunFolder) -> None:
    """One buffer of the base has the block that computes and the next one."""
    recipe = all_recomputed(folder, "control")

    def use_one_buffer(_: int) -> None:
        real = BlockShards.allocate_buffers

        def allocate(self: BlockShards) -> None:
            real(self)
            del self._buffers[1:]

        pytest.MonkeyPatch().setattr(BlockShards, "allocate_buffers", allocate)

    assert train_together(recipe, prepare=use_one_buffer) == [0, 0]
    assert difference(RunFolder(Path(recipe.output)), alone) > 1000 * CLOSE


def test_parameters_that_are_replaced_too_early_are_noticed(folder: Path, alone: RunFolder) -> None:
    """The parameters of the next block overwrite those of the block that computes."""
    recipe = all_recomputed(folder, "replaced")

    def replace_early(_: int) -> None:
        real = ShardedParameters.enter

        def enter(self: ShardedParameters, block: int, following: int) -> None:
            real(self, block, following)
            if self._coming is not None:
                views = [parameter.data for parameter in self._parameters(block)]
                self._finish()
                for parameter, view in zip(self._parameters(block), views, strict=True):
                    parameter.data = view

        pytest.MonkeyPatch().setattr(ShardedParameters, "enter", enter)

    assert train_together(recipe, prepare=replace_early) == [0, 0]
    assert difference(RunFolder(Path(recipe.output)), alone) > 1000 * CLOSE


def test_parameters_that_are_freed_too_early_are_noticed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are NaN in the backward pass, and then the gradients are."""
    recipe = all_recomputed(folder, "freed")

    def free_early(_: int) -> None:
        real = ShardedParameters.enter

        def enter(self: ShardedParameters, block: int, following: int) -> None:
            real(self, block, following)
            if torch._C._current_graph_task_id() >= 0:  # In a backward pass.
                self._free(block)

        pytest.MonkeyPatch().setattr(ShardedParameters, "enter", enter)

    assert train_together(recipe, prepare=free_early) == [NotFinite.exit_code] * 2
    assert capfd.readouterr().err.count("NotFinite: step 1") >= 2
