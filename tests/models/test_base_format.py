"""Every part of the package stores a linear in the bits that `base.overrides` gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import RecipeError
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.files.locate import read_config
from qlora_cli.models.attach import base_at
from qlora_cli.models.base_format import BaseFormat, base_format_of
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.plan import dry_run, replay
from qlora_cli.plan.planner import plan_largest_batches
from qlora_cli.plan.repeat import repeat
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run
from qlora_cli.units import GIB
from tests.helpers.families import MODEL_TYPES, as_in_file
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

MIXED = {"down": 8, "*.0.*": 16, "q": 4}
"""Exceptions of all three sizes; the last one replaces the second in block 0."""
PROFILE = DeviceProfile("cpu", "a CPU", 24 * GIB)


def recipe_of(folder: Path, family: str, overrides: Any = MIXED, **base: Any) -> Recipe:
    if not (folder / family).exists():
        make_base(folder / family, family, spread=0.15)
    rows = make_rows(folder / "rows.jsonl")
    return make_recipe(folder / family, rows, base={"overrides": overrides, **base})


def bits_of(loaded: LoadedModel) -> dict[str, int]:
    return {s.path: base_at(loaded, s.path).weight_format.bits for s in loaded.sites}


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_the_model_computes_with_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    # Without LLM.int8(), which also rounds the input.
    loaded = build_base(recipe_of(tmp_path, family, {**MIXED, "down": 16}))
    assert set(bits_of(loaded).values()) == {4, 16}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
    with torch.no_grad():
        for site in loaded.sites:
            weight = base_at(loaded, site.path).dequantize()
            plain.get_submodule(site.path).weight.copy_(as_in_file(family, weight))
        ids = torch.tensor([[5, 9, 200, 31, 77, 42, 8]])
        expected = plain(ids).logits[0]
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)
    with_four = build_base(recipe_of(tmp_path, family, {}))
    assert not torch.allclose(logits(with_four, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_merging_adds_the_product_to_the_weights_of_training(family: str, tmp_path: Path) -> None:
    run, loaded = make_run(tmp_path / "run", recipe_of(tmp_path, family))
    assert set(bits_of(loaded).values()) == {4, 8, 16}
    tensors = open_merged_tensors(Run(run.path), "dequantized", torch.float32, CPU)
    for site in loaded.sites:
        layer: Any = loaded.model.get_submodule(site.path)
        expected = as_in_file(family, layer.base.dequantize() + layer.delta())
        made = tensors.compute(f"{site.path}.weight")
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)


def test_the_last_matching_pattern_counts() -> None:
    default = WeightFormat(4, torch.float32, torch.float16)
    base_format = BaseFormat(default, (("q", 8), ("*.0.*", 16), ("blocks.1.proj", 8)))
    rows = {"q": slice(0, 4), "k": slice(4, 8)}
    found = [
        base_format.of(Site(path, tuple(rows), rows, 4, 8, False, False)).bits
        for path in ("blocks.0.fused", "blocks.1.fused")
    ]
    other = Site("blocks.1.proj", ("o",), {"o": slice(0, 4)}, 4, 4, False, False)
    assert (*found, base_format.of(other).bits) == (16, 8, 8)
    assert base_format.of(other).compute == default.compute
    assert (base_format.is_quantized, base_format.text) == (True, "mixed 4- and 8- and 16-bit")


@pytest.mark.parametrize("targets", ["all", ["model.layers.1.mlp.down_proj"]])
def test_a_pattern_without_a_match_is_named_by_plan_and_job(targets: Any, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", {"down": 8, "*.dwon_proj": 8})
    recipe = recipe.model_copy(
        update={"adapter": recipe.adapter.model_copy(update={"targets": targets})}
    )
    config = read_config(tmp_path / "llama" / "config.json")
    for refuse in (build_base, lambda r: plan_largest_batches(r, config, PROFILE)):
        with pytest.raises(RecipeError) as caught:
            refuse(recipe)
        assert "'*.dwon_proj' matches nothing" in str(caught.value)
        assert "'down'" not in str(caught.value)
        assert "gate" in str(caught.value), "it does not name what there is"


def test_a_base_of_16_bit_with_exceptions_is_quantized(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", {"down": 4}, bits=16)
    assert base_format_of(recipe, torch.float16).is_quantized
    assert not base_format_of(recipe_of(tmp_path, "llama", {}, bits=16), torch.float16).is_quantized


@pytest.mark.parametrize(
    ("overrides", "is_repeated"),
    [({"down": 8}, True), ({"model.layers.0.*": 16}, True), ({"model.layers.7.*": 8}, False)],
    ids=str,
)
def test_only_blocks_of_equal_formats_are_repeated(
    overrides: Any, is_repeated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "llama", "llama", num_hidden_layers=9)
    recipe = recipe_of(tmp_path, "llama", overrides)
    config = read_config(tmp_path / "llama" / "config.json")
    added: list[int] = []
    monkeypatch.setattr(replay, "repeat", lambda *given: added.append(given[2]) or repeat(*given))
    plan = plan_largest_batches(recipe, config, PROFILE)
    assert bool(added) == is_repeated
    monkeypatch.setattr(dry_run, "groups_of", lambda *_: None)
    complete = plan_largest_batches(recipe, config, PROFILE)
    assert plan.phases == complete.phases
    plain = plan_largest_batches(recipe_of(tmp_path, "llama", {}), config, PROFILE)
    assert plain.phases != plan.phases
