"""A base that is sharded over processes gives the result of a complete one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Silent
from qlora_cli.jobs import evaluate
from qlora_cli.jobs.results import EvalResult
from qlora_cli.models.placement.block_shards import BlockShards
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_evaluations
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import make_bases, recipe_of
from tests.helpers.runs import make_base
from tests.helpers.together import difference, train_together

pytestmark = pytest.mark.slow

CLOSE = 1e-6


def recipe_in(folder: Path, name: str, base: dict[str, Any]) -> Recipe:
    """Return a recipe whose third step has one micro-batch of the four of a step."""
    train = {"grad_accum": 4, "eval_every": 3, "lr": 1e-3, "activation_checkpointing": 3}
    adapter = {"dropout": 0.2, "rank": 32}
    return recipe_of(folder, folder / name, "wide", train=train, base=base, adapter=adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows and a base whose weights need more memory than the loss."""
    folder = make_bases(tmp_path_factory.mktemp("shards"))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    make_base(folder / "wide", "llama", spread=0.05, **sizes)
    return folder


def assert_planned(run: RunFolder, processes: int) -> None:
    """Assert that each process' peak is the planned one."""
    ledger = json.loads(run.memory_json.read_text())
    assert len(ledger["processes"]) == processes
    for process in ledger["processes"]:
        peak = max(phase["peak_bytes"] for phase in process["phases"])
        assert peak == pytest.approx(ledger["planned_peak_bytes"], rel=0.01)


def optimizer_bytes(phases: list[dict[str, Any]]) -> int:
    """Return the bytes of optimizer states in a step."""
    (step,) = (phase for phase in phases if phase["name"] == "step")
    return int(step["at_peak"]["optimizer"])


def assert_divided(run: RunFolder, alone: RunFolder) -> None:
    """Assert that each process has its share of the optimizer states of one process."""
    ledger, complete = (json.loads(item.memory_json.read_text()) for item in (run, alone))
    own = [optimizer_bytes(process["phases"]) for process in ledger["processes"]]
    total = optimizer_bytes(complete["phases"])
    assert sum(own) == pytest.approx(total, rel=0.01)
    assert max(own) == pytest.approx(total / len(own), rel=0.01)


def evaluated(run: RunFolder) -> float:
    """Return the held-out loss of a run, computed by one process."""
    rows = run.path.parent / "rows.jsonl"
    result = evaluate.run(str(run.path), data=str(rows), observer=Silent())
    assert isinstance(result, EvalResult)
    return result.loss


def trained_together(recipe: Recipe, size: int) -> RunFolder:
    assert train_together(recipe, size) == [0] * size
    return RunFolder(Path(recipe.output))


def test_a_sharded_base_gives_the_bits_of_a_complete_one(folder: Path) -> None:
    # The first run keeps a packed copy, which its other process and the second run read.
    mixed = {"overrides": {"down": 8, "q": 16}, "cache": True}
    complete = trained_together(recipe_in(folder, "complete", mixed), 2)
    sharded = trained_together(recipe_in(folder, "mixed", {"residency": "shard", **mixed}), 2)
    assert difference(sharded, complete) == 0.0
    assert_planned(complete, 2)
    assert_planned(sharded, 2)
    assert evaluated(sharded) == pytest.approx(
        read_evaluations(sharded.metrics)[-1].loss, rel=CLOSE
    )


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunFolder:
    return train_run(recipe_in(folder, "alone", {}))


def test_four_processes_that_share_the_base_equal_one(folder: Path, alone: RunFolder) -> None:
    run = trained_together(recipe_in(folder, "sharded", {"residency": "shard"}), 4)
    assert difference(run, alone) < CLOSE
    assert_planned(run, 4)
    assert_divided(run, alone)


def test_a_buffer_that_is_used_again_too_early_is_noticed(folder: Path, alone: RunFolder) -> None:
    recipe = recipe_in(folder, "control", {"residency": "shard"})
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"activation_checkpointing": True})}
    )

    def use_one_buffer(_: int) -> None:
        real = BlockShards.allocate_buffers

        def allocate(self: BlockShards) -> None:
            real(self)
            del self._buffers[1:]

        BlockShards.allocate_buffers = allocate  # type: ignore[method-assign]

    assert train_together(recipe, prepare=use_one_buffer) == [0, 0]
    assert difference(RunFolder(Path(recipe.output)), alone) > 1000 * CLOSE
