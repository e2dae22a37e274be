"""Every shipped recipe is valid, has a correct header, and can be planned or trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.plan import planned_gpu
from qlora_cli.files.locate import read_config
from qlora_cli.plan.planner import plan_largest_batches
from qlora_cli.recipe.document import read_document
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.shipped import shipped_recipes, summary
from qlora_cli.units import GIB
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

PLANNED = {
    "chat": ("Qwen2.5-3B", "8GiB"),
    "gpt2-e2e": ("gpt2-medium", "8GiB"),
    "llama-3.1-8b-24gb": ("Llama-3-8B", "24GiB"),
    "llama-3.1-8b-8gb": ("Llama-3-8B", "8GiB"),
    "mistral-7b-12gb": ("Mistral-7B-v0.1", "12GiB"),
    "qwen2.5-7b-12gb": ("Qwen2.5-7B", "12GiB"),
    "roberta-large-8gb": ("roberta-large", "8GiB"),
}
"""Recipe -> (config with the shapes of its base, memory of the GPU that it is meant for)."""
TRAINED = {"starter"}
"""Recipes that train on any machine, without a network."""


def header(file: Path) -> str:
    """Return the header comment of a recipe on one line."""
    lines = file.read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_every_shipped_recipe_is_tested_here() -> None:
    assert set(shipped_recipes()) == set(PLANNED) | TRAINED


@pytest.mark.parametrize("name", sorted(set(PLANNED) | TRAINED))
def test_it_loads_and_describes_itself(name: str) -> None:
    file = shipped_recipes()[name]
    assert load_recipe(name).output == f"runs/{name}"
    assert summary(file).endswith(".")
    assert ("Measured on" in header(file)) != ("Not measured. Planned by" in header(file))


@pytest.mark.parametrize("name", sorted(set(PLANNED) | TRAINED))
def test_it_sets_no_default_value(name: str) -> None:
    content = read_document(shipped_recipes()[name].read_text()).content
    for section, settings in content.items():
        if section == "task":
            continue
        model: Any = Recipe.model_fields[section].annotation
        same = [key for key, value in settings.items() if model.model_fields[key].default == value]
        assert not same, f"{section}: {', '.join(same)}"


def small(config: Path, folder: Path) -> Path:
    """Write a copy of a config with two blocks, which is planned quickly."""
    content = json.loads(config.read_text())
    for key in ("num_hidden_layers", "n_layer"):
        if key in content:
            content[key] = 2
    content.pop("layer_types", None)  # It has one entry per block.
    path = folder / "small.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", PLANNED)
def test_it_plans(name: str, shared: Path, tmp_path: Path) -> None:
    config, vram = PLANNED[name]
    base = small(shared / "data" / "configs" / f"{config}.json", tmp_path)
    outcome = qlora("plan", name, f"model.name={base}", "--vram", vram, "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json
    assert plan["fits"] is True
    assert 0 < plan["trainable_parameters"] < plan["total_parameters"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_its_header_has_the_planned_memory_of_the_complete_base(name: str, shared: Path) -> None:
    config, vram = PLANNED[name]
    profile = planned_gpu(vram)
    text = header(shipped_recipes()[name])
    figures = re.search(r"--vram (\w+)` on .*?: peak ([\d.]+) GiB, ([\d.]+) GiB reserved", text)
    assert figures, text
    recipe, _ = resolve(load_recipe(name), profile)
    base = read_config(shared / "data" / "configs" / f"{config}.json")
    memory = plan_largest_batches(recipe, base, profile)
    planned = [memory.peak_bytes, memory.reserved_bytes or 0]
    assert [*figures.groups()] == [vram, *(f"{size / GIB:.2f}" for size in planned)]
    assert memory.fits(profile.usable_bytes)


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_it_trains(name: str, tmp_path: Path) -> None:
    changes = (f"output={tmp_path / 'run'}", "train.steps=4", "train.grad_accum=1", "data.eval=")
    outcome = qlora("train", name, *changes, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
