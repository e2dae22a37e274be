"""The training step, the dry run and evaluation use only the task's interface."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import qlora_cli
from qlora_cli.data.collate import Batch, collate, largest_batch
from qlora_cli.data.encode import Example, encode
from qlora_cli.errors import RecipeError
from qlora_cli.events import Silent
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.prepare import prepare
from qlora_cli.memory.device import profile_of
from qlora_cli.models.model import LoadedModel
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.registry import TASKS, task_of
from qlora_cli.tasks.task import EvalScore, MetricSums, Task, eval_mode
from qlora_cli.train.state import State, build_state
from qlora_cli.train.step import train_step
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows
from tests.helpers.training import ROWS

PACKAGE = Path(qlora_cli.__file__).parent


class SmallStates(Task):
    """Make the first component of each hidden state small. Every token is a target."""

    name = "small_states"

    @property
    def model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def encode(self, *arguments: Any, **options: Any) -> list[Example]:
        return encode(*arguments, **options)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def num_targets(self, batches: Sequence[Batch]) -> int:
        return sum(batch.num_tokens for batch in batches)

    def loss(
        self,
        loaded: LoadedModel,
        batch: Batch,
        device: torch.device,
        scale: float,
        metrics: MetricSums | None = None,
    ) -> Tensor:
        first = hidden_states(loaded, batch, device)[:, 0].float()
        return first.square().sum() * scale

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, batches: Iterable[Batch], device: torch.device
    ) -> EvalScore:
        batches = list(batches)
        with eval_mode(loaded):
            losses = [self.loss(loaded, batch, device, 1.0) for batch in batches]
        num_targets = self.num_targets(batches)
        total = 0.0 if device.type == "meta" else float(sum(losses))
        return EvalScore(total / num_targets, num_targets, {"squared": total})

    def compared_states(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return hidden_states(loaded, batch, device), batch.input_ids[0].to(device)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "llama", "llama", spread=0.15)


def recipe_of(base: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that names `task`, which is registered for the duration of a test."""
    monkeypatch.setitem(TASKS, task.name, task)
    recipe = make_recipe(base, make_rows(base / "rows.jsonl"))
    return recipe.model_copy(update={"task": task.name})


def state_of(recipe: Recipe) -> State:
    return build_state(prepare(recipe, profile_of(CPU)).request(CPU, Silent()))


def test_a_registered_task_trains(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches per step; the loss is the task's own, divided by the task's targets."""
    state = state_of(recipe_of(base, SmallStates(), monkeypatch))
    batches = [collate(ROWS[:2]), collate(ROWS[2:])]
    before = state.task.evaluate(state.loaded, batches, CPU)
    first = train_step(state, batches, 1e-2)
    assert first.loss == pytest.approx(before.loss, rel=1e-5)
    assert before.num_targets == first.tokens == sum(len(row.ids) for row in ROWS)
    second = train_step(state, batches, 1e-2)
    after = state.task.evaluate(state.loaded, batches, CPU)
    assert after.loss < second.loss < first.loss


def test_a_registered_task_is_planned(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run runs the task's loss: without logits it needs less memory than causal."""
    toy = recipe_of(base, SmallStates(), monkeypatch)
    batches = [largest_batch(32, 2, 250)] * 2
    config = read_config(base / "config.json")
    plans = [
        {
            phase.name: phase.at_peak.get("loss", 0)
            for phase in dry_run(recipe, config, profile_of(CPU), batches, batches[:1]).phases
        }
        for recipe in (toy, toy.model_copy(update={"task": "causal"}))
    ]
    assert plans[0].keys() == plans[1].keys() >= {"first_step", "step", "eval"}
    assert plans[0]["eval"] == 0 < plans[1]["eval"]


def test_a_task_that_is_not_implemented_is_refused(base: Path) -> None:
    recipe = make_recipe(base, make_rows(base / "rows.jsonl"))
    recipe = recipe.model_copy(update={"task": "translation"})
    with pytest.raises(RecipeError, match="translation is not supported by this version"):
        task_of(recipe)


def test_the_schema_accepts_exactly_the_registered_tasks(base: Path) -> None:
    recipe = make_recipe(base, make_rows(base / "rows.jsonl")).model_dump(exclude_unset=True)
    accepted = set()
    for name in get_args(Recipe.model_fields["task"].annotation):
        with suppress(ValueError):
            accepted.add(Recipe.model_validate(recipe | {"task": name}).task)
    assert accepted == set(TASKS)
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("module", ["train/step.py", "train/state.py", "plan/dry_run.py"])
def test_the_shared_code_imports_no_task(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tasks = {name for name in imported if name and name.startswith("qlora_cli.tasks.")}
    assert tasks <= {"qlora_cli.tasks.task", "qlora_cli.tasks.registry"}
