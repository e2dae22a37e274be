"""LoRA on experts: train, resume, merge, verify; swapped experts are detected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.adapters.adapted_modules import adapted_stacks
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.errors import Interrupted, ModelError, ProblemsError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.combine import WeightedAdapter, combine
from qlora_cli.files import cache
from qlora_cli.jobs import merge, train, verify
from qlora_cli.models.attach import attach_adapter, load_adapter
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.models.switch import AdapterSwitch
from tests.helpers.interrupted import train_run
from tests.helpers.moe import expert_recipe, make_moe
from tests.helpers.runs import build_base, make_base, make_recipe, make_rows, randomize_b

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share the proofs of one new cache."""
    folder = tmp_path_factory.getbasetemp() / "expert_cache"
    monkeypatch.setenv(cache.SWITCH, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kind"), [("qwen3_moe", "dequantized"), ("gpt_oss", "original")]
)
def test_a_merge_with_swapped_experts_is_detected(
    model_type: str, kind: str, tmp_path: Path
) -> None:
    recipe = expert_recipe(make_moe(tmp_path / "base", model_type), tmp_path)
    train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    run, out = tmp_path / "run", tmp_path / "merged"
    merge.run(run, out=out, dtype=None, base=kind, observer=Silent())
    result = verify.run(out, against=run, observer=Silent())
    assert result.passed, result.faults
    file = out / "model.safetensors"
    tensors = load_file(file)
    if model_type == "gpt_oss":
        name = f"{EXPERTS}.down_proj"
        tensors[name] = tensors[name][[1, 0, 2, 3]]
        changed = {name}
    else:
        names = [f"{EXPERTS}.{number}.up_proj.weight" for number in (0, 1)]
        tensors |= dict(zip(names, [tensors[names[1]], tensors[names[0]]], strict=True))
        changed = set(names)
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify.run(out, against=run, observer=Silent())
    assert not result.passed
    named = {fault.split()[0] for fault in result.faults}
    assert changed <= named, result.faults


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "base", "qwen3_moe")
    recipe = expert_recipe(base, tmp_path)
    whole = train_run(recipe.model_copy(update={"output": str(tmp_path / "whole")}))
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    resumed = train_run(recipe, resume=True)
    name = "adapter_model.safetensors"
    assert (whole.adapter / name).read_bytes() == (resumed.adapter / name).read_bytes()
    assert any(".experts." in key for key in load_file(whole.adapter / name))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_an_adapter_is_read_back_exactly(model_type: str, tmp_path: Path) -> None:
    recipe = expert_recipe(make_moe(tmp_path / "base", model_type), tmp_path)
    loaded = build_base(recipe)
    randomize_b(loaded)
    save_adapter(loaded, recipe, tmp_path / "adapter")
    other, attached = build_base(recipe), build_base(recipe)
    load_adapter(other, tmp_path / "adapter")
    attach_adapter(attached, open_adapter(tmp_path / "adapter"))
    wanted = dict(adapted_stacks(loaded.model))
    assert len(wanted) == 4
    for found in (other, attached):
        stacks = dict(adapted_stacks(found.model))
        assert stacks.keys() == wanted.keys()
        for path, stack in wanted.items():
            assert torch.equal(stacks[path].lora().a, stack.lora().a)
            assert torch.equal(stacks[path].lora().b, stack.lora().b)


def test_combined_adapters_are_the_sum_of_their_products(tmp_path: Path) -> None:
    recipe = expert_recipe(make_moe(tmp_path / "base", "qwen3_moe"), tmp_path)
    deltas = []
    for seed in (1, 2):
        loaded = build_base(recipe)
        randomize_b(loaded, seed=seed)
        save_adapter(loaded, recipe, tmp_path / str(seed))
        deltas.append(dict(adapted_stacks(loaded.model))[f"{EXPERTS}.gate_up_proj"].delta(2))
    first, second = (open_adapter(tmp_path / str(seed)) for seed in (1, 2))
    combined = combine([WeightedAdapter(first, 0.5), WeightedAdapter(second, 2.0)])
    combined.check([*loaded.sites, *loaded.stacks])
    lora = combined.stacks[f"{EXPERTS}.gate_up_proj"].read()
    found = (lora.scaling * lora.b[2] @ lora.a[2]).float()
    torch.testing.assert_close(found, 0.5 * deltas[0] + 2.0 * deltas[1], rtol=1e-5, atol=1e-7)


def test_all_does_not_include_experts(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "base", "qwen3_moe")
    without = build_base(expert_recipe(base, tmp_path, adapter={"targets": "all"}))
    assert not list(adapted_stacks(without.model))
    one = [f"{EXPERTS}.down_proj"]
    targeted = build_base(expert_recipe(base, tmp_path, adapter={"targets": one}))
    assert [path for path, _ in adapted_stacks(targeted.model)] == one
    both = build_base(expert_recipe(base, tmp_path, adapter={"targets": ["all", "experts"]}))
    assert both.adapted.keys() == without.adapted.keys() | {site.path for site in both.stacks}


def test_experts_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    recipe = make_recipe(
        make_base(tmp_path / "base", "llama"),
        make_rows(tmp_path / "rows.jsonl"),
        adapter={"targets": ["q", "experts"]},
    )
    with pytest.raises(ProblemsError, match="this model has no experts"):
        build_base(recipe)


def test_dropout_is_refused(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "base", "qwen3_moe")
    recipe = expert_recipe(base, tmp_path, adapter={"dropout": 0.1})
    with pytest.raises(ProblemsError, match=r"adapter\.dropout"):
        build_base(recipe)


def test_experts_are_not_added_to_loaded_weights(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "base", "qwen3_moe")
    recipe = expert_recipe(base, tmp_path, base={"bits": 16})
    loaded = build_base(recipe)
    save_adapter(loaded, recipe, tmp_path / "adapter")
    source = open_source(base, loaded.family)
    with pytest.raises(UsageError, match="adapts experts"):
        AdapterSwitch(loaded, source, merged=True)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    recipe = expert_recipe(make_moe(tmp_path / "base", "qwen3_moe"), tmp_path)
    loaded = build_base(recipe)
    save_adapter(loaded, recipe, tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    fewer = [replace(site, num_experts=3) for site in loaded.stacks]
    with pytest.raises(ProblemsError, match="for experts of shape"):
        adapter.check([*loaded.sites, *fewer])
    with pytest.raises(ProblemsError, match="the base has no such experts"):
        adapter.check(loaded.sites)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    linears = {k: v for k, v in load_file(file).items() if ".experts" not in k}
    save_file(linears, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the file has no adapter of it"):
        open_adapter(tmp_path / "adapter")
