"""`base.bits: auto` chooses the bits once: the run and the cache have the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted, RecipeError, UsageError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.jobs import auto_bits, plan, quantize
from qlora_cli.recipe.gpus import planned_gpu
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run
from tests.helpers.interrupted import train_run
from tests.helpers.runs import make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))


def recipe_of(folder: Path, output: str = "run", **base: Any) -> Recipe:
    model = folder / "base"
    if not model.exists():
        make_base(model, "llama", spread=0.15)
        make_rows(folder / "rows.jsonl", num=16)
    settings = {"bits": "auto", "budget": "142KiB", **base}
    train = {"steps": 3, "checkpoint_every": 1}
    recipe = make_recipe(model, folder / "rows.jsonl", base=settings, train=train)
    return recipe.model_copy(update={"output": str(folder / output)})


def test_a_resumed_run_keeps_the_bits_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_run(recipe_of(tmp_path, "whole"))
    recipe = recipe_of(tmp_path, "stopped")
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=1)
    monkeypatch.setattr(auto_bits, "_choose", lambda *_: pytest.fail("measured again"))
    run = train_run(recipe, resume=True)
    stored = Run(run.path).recipe.base
    assert stored.bits == 4
    assert {*stored.overrides.values()} & {8, 16}
    assert stored.budget is None
    choices = {choice["key"]: choice for choice in run.read()["choices"]}
    assert choices["base.overrides"]["value"] == stored.overrides
    assert "KL to 16 bit" in choices["base.bits"]["reason"]
    weights = [r.adapter / "adapter_model.safetensors" for r in (whole, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_choice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    arguments: Any = {"device_profile": None, "fit": False, "compare": False}
    first = plan.run(recipe, **arguments)
    monkeypatch.setattr(auto_bits, "measure", lambda *_: pytest.fail("measured again"))
    assert plan.run(recipe, **arguments).ledger.phases == first.ledger.phases
    monkeypatch.undo()
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "other"))
    assert plan.run(recipe, **arguments).ledger.phases == first.ledger.phases


def test_the_measurement_of_the_command_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)
    arguments: Any = {"target_kl": None, "out": None, "observer": Silent()}
    result = quantize.run(recipe, budget=None, **arguments)
    assert result.budget_bytes == 142 * 1024, "base.budget is not used"
    monkeypatch.setattr(auto_bits, "measure", lambda *_: pytest.fail("measured again"))
    run = train_run(recipe)
    assert Run(run.path).recipe.base.overrides == result.chosen.overrides != {}


def test_the_base_gets_what_fits(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, budget=None)
    result = plan.run(recipe, device_profile=planned_gpu("24GiB"), fit=False, compare=False)
    assert any(note.startswith("base.bits = 16: 16 bit needs") for note in result.notes)


def test_settings_of_4_bit_end_if_16_bit_fits(tmp_path: Path) -> None:
    run = train_run(recipe_of(tmp_path, budget="1GiB", quant_type="fp4", scales="search"))
    base = Run(run.path).recipe.base
    assert (base.bits, base.quant_type, base.scales) == (16, "nf4", "absmax")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("{bits: auto, overrides: {down: 8}}", "overrides have no effect with bits: auto"),
        ("{bits: 8, budget: 6GiB}", "budget applies to bits: auto only"),
        ("{bits: auto, budget: much}", "is not a size"),
        ("{bits: 5}", "auto, 4, 8 or 16"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    settings: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"model: {{name: x}}\ndata: {{train: x.jsonl}}\nbase: {settings}\n")
    with pytest.raises(RecipeError, match=text):
        load_recipe(file)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "labels.jsonl"
    rows.write_text("".join(f'{{"text": "row {n}", "label": "{n % 2}"}}\n' for n in range(8)))
    recipe = recipe_of(tmp_path)
    data = recipe.data.model_copy(update={"train": str(rows), "format": "classification"})
    recipe = recipe.model_copy(update={"task": "classification", "data": data})
    with pytest.raises(UsageError, match="a classifier does not have"):
        train_run(recipe)
