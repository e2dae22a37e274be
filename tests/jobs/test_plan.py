"""`qlora plan`: whether a job fits, which changes make it fit, what is counted and assumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import RecipeError
from qlora_cli.jobs import plan as job
from qlora_cli.jobs.results import PlanResult
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import GIB, MIB
from tests.helpers.runs import make_recipe

pytestmark = pytest.mark.slow

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
GPT3 = {
    "model_type": "gpt2",
    "n_embd": 12288,
    "n_layer": 96,
    "n_head": 96,
    "n_positions": 2048,
    "vocab_size": 50257,
}
CONTEXT = 100 * MIB


def gpu(capacity: int) -> DeviceProfile:
    return DeviceProfile("cuda", "a GPU", capacity, (8, 9), 128, CONTEXT, is_planned=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("llama") / "config.json"
    file.write_text(json.dumps(LLAMA))
    return file


def recipe_of(config: Path, **sections: Any) -> Recipe:
    settings = {
        "base": {"bits": 4, "compute_dtype": "auto", "residency": "device"},
        "adapter": {"rank": 8, "targets": "all"},
        "data": {"seq_len": 1024},
        "train": {"micro_batch": 2, "grad_accum": 4},
    }
    merged = {key: {**value, **sections.get(key, {})} for key, value in settings.items()}
    return make_recipe(config, config.with_name("rows.jsonl"), **merged)


def run(recipe: Recipe, capacity: int, *, fit: bool = False, compare: bool = False) -> PlanResult:
    return job.run(recipe, device_profile=gpu(capacity), fit=fit, compare=compare)


def test_the_memory_of_the_cuda_context_is_not_available(llama: Path) -> None:
    recipe = recipe_of(llama, train={"offload_inputs": False})
    needed = run(recipe, 24 * GIB).ledger.allocator.reserved
    assert run(recipe, needed + CONTEXT).fits
    # Below the peak of the tensors themselves, no allocator state can fit.
    assert not run(recipe, run(recipe, 24 * GIB).ledger.planned_peak_bytes + CONTEXT - 1).fits


def test_reserved_exceeds_allocated_and_a_note_calls_both_modelled(llama: Path) -> None:
    result = run(recipe_of(llama), 24 * GIB)
    allocator = result.ledger.allocator
    assert allocator.reserved > allocator.allocated == result.ledger.planned_peak_bytes
    assert any("allocated and reserved are modelled" in note for note in result.notes)
    assert any("100 MiB" in note and "assumed" in note for note in result.notes)


def test_a_plan_for_a_cpu_has_no_reserved_bytes_and_no_notes(llama: Path) -> None:
    profile = DeviceProfile("cpu", "a CPU", 24 * GIB)
    result = job.run(recipe_of(llama), device_profile=profile, fit=False, compare=False)
    assert result.ledger.allocator.reserved == 0
    assert not result.notes


def test_every_change_that_is_reported_to_fit_fits(llama: Path) -> None:
    recipe = recipe_of(llama, base={"bits": 16}, train={"activation_checkpointing": False})
    now = run(recipe, 24 * GIB).ledger.planned_peak_bytes
    capacity = int(now * 0.7) + CONTEXT
    result = run(recipe, capacity)
    assert not result.fits
    fitting = [item for item in result.advice if item.fits]
    assert "train.activation_checkpointing=true" in {item.change for item in fitting}
    assert any(item.change.startswith("data.seq_len=") for item in fitting)
    order = [item.fits for item in result.advice]
    assert order == sorted(order, reverse=True)
    seconds = [item.seconds_per_token for item in fitting]
    assert seconds == sorted(seconds), "the fastest change is first"
    ratios = {item.change: item.time_ratio for item in fitting}
    assert ratios["train.activation_checkpointing=true"] > 1.0, "recomputation takes time"
    assert all(item.time_source.startswith("assumed 50 TFLOP/s") for item in fitting)
    for item in (result.advice[0], result.advice[-1]):
        again = run(changed(recipe, item.change), capacity)
        assert again.fits == item.fits, item
        assert again.ledger.planned_peak_bytes == item.peak_bytes == now - item.saves_bytes


def test_if_the_weights_alone_are_too_large_only_fewer_bits_are_planned(llama: Path) -> None:
    """In 16 bit the frozen weights do not fit; in 4 bit the complete job fits."""
    short: dict[str, Any] = {"data": {"seq_len": 64}, "train": {"micro_batch": 1}}
    four = run(recipe_of(llama, **short), 24 * GIB)
    recipe = recipe_of(llama, base={"bits": 16}, **short)
    at_peak = run(recipe, 24 * GIB).ledger.after.at_peak
    enough = four.ledger.allocator.reserved + CONTEXT
    assert enough - CONTEXT < at_peak["base"] + at_peak["head"], "16-bit weights do not fit"
    result = run(recipe, enough)
    smaller = {"base.bits=8", "base.bits=4", "base.residency=host"}
    assert {item.change for item in result.advice} == smaller
    assert "base.bits=4" in [item.change for item in result.advice if item.fits]
    assert any("frozen weights alone" in note for note in result.notes)
    assert run(recipe, enough, fit=True).advice == result.advice, "no size is searched"
    assert not any("frozen weights" in note for note in four.notes)


def test_fit_finds_the_largest_size_that_fits(llama: Path) -> None:
    recipe = recipe_of(llama, train={"activation_checkpointing": True})
    capacity = run(recipe, 24 * GIB).ledger.allocator.reserved + CONTEXT + 20 * MIB
    result = run(recipe, capacity, fit=True)
    seconds = [item.seconds_per_token for item in result.advice]
    assert seconds == sorted(seconds)
    length, sequences = sorted(result.advice, key=lambda item: item.change)
    assert length.change.startswith("data.seq_len=")
    assert sequences.change.startswith("train.micro_batch=")
    assert recipe.train.micro_batch > 1
    assert length.change.endswith(" train.micro_batch=1")
    for item, unit in ((length, 64), (sequences, 1)):
        assert item.fits
        fitting = changed(recipe, item.change)
        again = run(fitting, capacity)
        assert again.fits
        assert again.ledger.planned_peak_bytes == item.peak_bytes
        key, _, size = item.change.split()[0].partition("=")
        assert not run(changed(fitting, f"{key}={int(size) + unit}"), capacity).fits


def changed(recipe: Recipe, changes: str) -> Recipe:
    for change in changes.split():
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        part = getattr(recipe, section).model_copy(update={name: yaml.safe_load(value)})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def test_a_job_that_does_not_fit_gets_advice_with_fit_too(llama: Path) -> None:
    recipe = recipe_of(llama, base={"bits": 16})
    frozen = run(recipe_of(llama), 24 * GIB).ledger.planned_peak_bytes
    result = run(recipe, frozen + CONTEXT + 40 * MIB, fit=True)
    assert not result.fits
    assert "base.bits=4" in {item.change for item in result.advice if item.fits}


def test_full_fine_tuning_and_float32_get_advice(llama: Path) -> None:
    full = recipe_of(llama, base={"bits": 16}, adapter={"method": "full"})
    lora = run(changed(full, "adapter.method=lora"), 24 * GIB).ledger.allocator.reserved
    result = run(full, lora + CONTEXT)
    assert not result.fits
    assert "adapter.method=lora" in {item.change for item in result.advice if item.fits}
    wide = recipe_of(llama, base={"compute_dtype": "float32"})
    narrow = run(changed(wide, "base.compute_dtype=bfloat16"), 24 * GIB).ledger.allocator.reserved
    result = run(wide, narrow + CONTEXT)
    assert "base.compute_dtype=bfloat16" in {item.change for item in result.advice if item.fits}


def test_too_large_a_micro_batch_is_refused(llama: Path) -> None:
    with pytest.raises(RecipeError, match="the micro-batch is too large to plan"):
        run(recipe_of(llama, train={"micro_batch": 10**6}), 24 * GIB)


def test_compared_methods_get_smaller(llama: Path) -> None:
    result = run(recipe_of(llama), 24 * GIB, compare=True)
    assert [(item.method, item.bits) for item in result.compare] == [
        ("full", 16),
        ("lora", 16),
        ("lora", 8),
        ("lora", 4),
    ]
    full, half, _, four = (item.peak_bytes for item in result.compare)
    assert full > half > four
    assert result.ledger.before.peak_bytes == full
    assert result.ledger.after.peak_bytes == four
    ratios = [item.ratio for item in result.compare]
    assert ratios == [full / item.peak_bytes for item in result.compare]
    assert ratios[-1] == result.ledger.ratio


def test_a_mixed_base_is_compared_too(llama: Path) -> None:
    result = run(recipe_of(llama, base={"overrides": {"down": 8}}), 24 * GIB, compare=True)
    *plain, mixed = result.compare
    assert [item.bits for item in plain] == [16, 16, 8, 4]
    assert (mixed.method, mixed.bits) == ("lora", None)
    assert mixed.peak_bytes == result.ledger.after.peak_bytes
    assert plain[-1].peak_bytes < mixed.peak_bytes < plain[1].peak_bytes


def test_a_note_names_the_outlier_bound(llama: Path) -> None:
    with_outliers = run(recipe_of(llama, base={"bits": 8}), 24 * GIB)
    without = run(recipe_of(llama, base={"bits": 8, "outlier_threshold": 0.0}), 24 * GIB)
    assert any("outlier" in note for note in with_outliers.notes)
    assert not any("outlier" in note for note in without.notes)
    assert with_outliers.ledger.planned_peak_bytes > without.ledger.planned_peak_bytes


def test_the_floor_is_below_the_peak(llama: Path) -> None:
    result = run(recipe_of(llama), 24 * GIB)
    assert 0 < result.floor_bytes < result.ledger.planned_peak_bytes


def test_the_papers_arithmetic(tmp_path: Path) -> None:
    """Hu et al. 2021, 4.2: GPT-3 175B, rank 4 on q and v."""
    (tmp_path / "config.json").write_text(json.dumps(GPT3))
    recipe = recipe_of(
        tmp_path / "config.json",
        adapter={"rank": 4, "targets": ["q", "v"], "dtype": "float16"},
        train={"micro_batch": 1},
    )
    result = run(recipe, 400 * GIB)
    lines = {line.name: line for line in result.arithmetic}
    assert result.trainable_parameters == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert lines["trained parameters"].value == result.trainable_parameters
    assert lines["checkpoint of the adapter"].value == result.adapter_bytes == 2 * 18_874_368
    assert 30e6 < result.adapter_bytes < 40e6  # "roughly 35MB"
    assert lines["checkpoint of the base"].value == pytest.approx(350e9, rel=0.01)
    assert lines["base / adapter"].value == pytest.approx(10_000, rel=0.1)
    assert lines["full fine-tuning"].value < 1.2e12 < lines["full fine-tuning with gradients"].value
    assert lines["LoRA"].value == pytest.approx(350e9, rel=0.01)
    assert lines["full / LoRA"].value == pytest.approx(3, rel=0.01)
    assert all(line.assumption for line in result.arithmetic)


def test_full_fine_tuning_has_no_adapter_to_count(llama: Path) -> None:
    recipe = recipe_of(llama, base={"bits": 16})
    full = recipe.model_copy(update={"adapter": type(recipe.adapter)(method="full")})
    result = run(full, 24 * GIB)
    assert not result.arithmetic
    assert result.ledger.ratio == 1.0


def test_a_config_file_is_enough(llama: Path) -> None:
    """No weights, tokenizer or rows are read, only config.json."""
    assert [path.name for path in llama.parent.iterdir()] == ["config.json"]
    assert replace(run(recipe_of(llama), 24 * GIB), seconds=0.0).fits


def test_the_printed_device_has_the_keys_of_the_contract(llama: Path) -> None:
    """`imagined` is the key for a GPU that is described by `--vram`."""  # words: allow
    device = run(recipe_of(llama), 24 * GIB).to_dict()["device"]
    assert device == {
        "kind": "cuda",
        "name": "a GPU",
        "capacity_bytes": 24 * GIB,
        "capability": (8, 9),
        "multiprocessors": 128,
        "context_bytes": CONTEXT,
        "imagined": True,  # words: allow
    }
