"""A base that bitsandbytes quantized is read, trained, merged and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.verify.tensor_checks import structure_faults, value_faults
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.jobs import merge, train, verify
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.instrument import Instrument
from qlora_cli.models import checkpoint_source
from qlora_cli.models.limits import limits_of
from qlora_cli.models.packed_base import has_packed_copy
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.plan.planner import Planner
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import (
    CPU,
    build_base,
    logits,
    make_base,
    make_recipe,
    make_rows,
    make_run,
)

FORMATS: dict[str, dict[str, Any]] = {
    "nested nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested fp4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
LINEAR = "model.layers.1.mlp.up_proj"


def quantized_base(folder: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """Return (a checkpoint of bitsandbytes, path -> dequantized weight of each linear)."""
    # bitsandbytes' kernels for a CPU need rows that are whole blocks.
    base = make_base(folder / "plain", "llama", spread=0.1, intermediate_size=128)
    settings = BitsAndBytesConfig(**FORMATS[name])
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map="cpu", dtype=torch.float16
    )
    model.save_pretrained(folder / "base")
    for file in base.glob("tokenizer*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weights[path] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            weights[path] = int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    assert len(weights) == 14
    return folder / "base", weights


@pytest.mark.parametrize("name", ["nested nf4", "fp4", "int8"])
def test_weights_are_those_that_bitsandbytes_computes_with(name: str, tmp_path: Path) -> None:
    base, weights = quantized_base(tmp_path, name)
    rows = make_rows(tmp_path / "rows.jsonl")
    loaded = build_base(make_recipe(base, rows, base={"bits": 16}))
    for path, layer in adapted_layers(loaded.model):
        wanted = weights[path].float()
        torch.testing.assert_close(layer.base.dequantize(), wanted, rtol=1e-3, atol=1e-4)


def test_nf4_keeps_its_codes(tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, "nested nf4")
    loaded = build_base(make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    codes = load_file(base / "model.safetensors")[f"{LINEAR}.weight"]
    assert torch.equal(loaded.model.get_submodule(LINEAR).base.weight, codes)


@pytest.mark.parametrize("name", ["nested nf4", "int8"])
def test_the_merge_is_the_dequantized_weight_and_the_adapter(name: str, tmp_path: Path) -> None:
    base, weights = quantized_base(tmp_path, name)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    run, loaded = make_run(tmp_path / "run", recipe)
    tensors = open_merged_tensors(Run(run.path), "original", torch.float16, CPU)
    write_merged(tensors, base, tmp_path / "merged", {}, Silent())
    assert not list(structure_faults(tmp_path / "merged", tensors))
    assert not list(value_faults(tmp_path / "merged", tensors, Silent()))
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    delta = dict(adapted_layers(loaded.model))[LINEAR].delta()
    wanted = weights[LINEAR].float() + delta
    torch.testing.assert_close(merged.get_submodule(LINEAR).weight, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_it_trains_with_a_note(tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, "nested nf4")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), train={"steps": 2})
    recipe = recipe.model_copy(update={"output": str(tmp_path / "run")})
    assert train.run(recipe, recipe_path=None, resume=False, observer=Silent()).steps == 2
    notes = limits_of(read_config(base / "config.json"), AutoModelForCausalLM)
    assert any("quantized by bitsandbytes" in note for note in notes)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, "nested nf4")
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = f"{LINEAR}.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = tensors[name][:20].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"bitsandbytes__nf4 is damaged"):
        build_base(make_recipe(base, make_rows(tmp_path / "rows.jsonl")))


SAME: dict[str, dict[str, Any]] = {
    "nested nf4": {"bits": 4},
    "nf4": {"bits": 4, "double_quant": False},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "nested fp4": {"bits": 4, "quant_type": "fp4"},
    "int8": {"bits": 8},
}
OTHER: dict[str, dict[str, Any]] = {"nested nf4": {"bits": 8}, "int8": {"bits": 4}}


LOGITS = 0.005
"""Largest difference of logits from those of float16 arithmetic, relative to the largest logit."""


def plain_recipe(folder: Path) -> Recipe:
    """Return the recipe of the base before quantization."""
    return make_recipe(folder / "plain", folder / "rows.jsonl", base={"bits": 16})


class NoWeights(FolderSource):
    """A checkpoint whose quantized weights may not be dequantized."""

    def read(self, name: str) -> Tensor:
        assert self.stored_format(name) is None, f"{name} is dequantized"
        return super().read(name)


@pytest.mark.parametrize("name", slow_after_first(list(SAME)))
def test_weights_in_the_format_of_the_recipe_are_not_unpacked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, weights = quantized_base(tmp_path, name)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base=SAME[name])
    monkeypatch.setattr(checkpoint_source, "FolderSource", NoWeights)
    loaded = build_base(recipe)
    file = load_file(base / "model.safetensors")
    for path, layer in adapted_layers(loaded.model):
        assert torch.equal(layer.base.weight, file[f"{path}.weight"])
        # bitsandbytes dequantizes to the dtype of the file, float16.
        torch.testing.assert_close(
            layer.base.dequantize(), weights[path].float(), rtol=5e-4, atol=1e-6
        )
        if name.startswith("nested"):
            assert torch.equal(layer.base.scale, file[f"{path}.weight.absmax"])
            assert torch.equal(layer.base.scale_of_scale, file[f"{path}.weight.nested_absmax"])


# In 8 bit, activations are rounded too, which each kernel does in its own way.
@pytest.mark.parametrize("name", slow_after_first([n for n in SAME if n != "int8"]))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, name)
    settings = SAME[name]
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base=settings)
    ids = torch.arange(3, 35)[None]
    theirs = AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.float32)
    # In eval mode, bitsandbytes' kernels for a CPU compute in bfloat16.
    theirs.train()
    with torch.no_grad():
        wanted = theirs(ids).logits[0].float()
    largest = wanted.abs().max()
    assert (logits(build_base(recipe), ids) - wanted).abs().max() < LOGITS * largest
    plain = logits(build_base(plain_recipe(tmp_path)), ids)
    assert (plain - wanted).abs().max() > LOGITS * largest, "before quantization"


@pytest.mark.parametrize("name", slow_after_first(list(OTHER)))
def test_another_format_is_quantized_again(name: str, tmp_path: Path) -> None:
    base, weights = quantized_base(tmp_path, name)
    loaded = build_base(make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base=OTHER[name]))
    for path, layer in adapted_layers(loaded.model):
        assert layer.base.weight_format.bits == OTHER[name]["bits"]
        error = (layer.base.dequantize() - weights[path].float()).abs().max()
        assert error < 0.3 * weights[path].abs().max()


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, "nf4")
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = f"{LINEAR}.weight.absmax"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit its shape"):
        build_base(make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base=SAME["nf4"]))


@pytest.mark.slow
def test_it_is_merged_into_the_dequantized_weights_only(tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, "nested nf4")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    run, loaded = make_run(tmp_path / "run", recipe)
    given = {"dtype": None, "observer": Silent()}
    with pytest.raises(UsageError, match="no original weights") as error:
        merge.run(run.path, out=tmp_path / "refused", base="original", **given)
    assert "--base dequantized" in str(error.value)
    assert merge.run(run.path, out=tmp_path / "merged", base="auto", **given).base == "dequantized"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for path, layer in adapted_layers(loaded.model):
        wanted = (layer.base.dequantize() + layer.delta()).to(torch.float16)
        torch.testing.assert_close(merged[f"{path}.weight"], wanted, rtol=1e-3, atol=1e-6)
    verified = verify.run(tmp_path / "merged", against=run.path, observer=Silent())
    assert verified.passed, verified.faults


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested nf4", "int8"])
def test_the_plan_of_loading_equals_the_run(name: str, tmp_path: Path) -> None:
    base, _ = quantized_base(tmp_path, name)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base=SAME[name])
    config = read_config(base / "config.json")
    assert has_packed_copy(recipe, base, config, AutoModelForCausalLM, "cpu")
    other = make_recipe(base, tmp_path / "rows.jsonl", base={"bits": 12 - SAME[name]["bits"]})
    assert not has_packed_copy(other, base, config, AutoModelForCausalLM, "cpu")
    instrument = Instrument(CPU, profile_of(CPU))
    clear_scale_codebook(CPU)
    with instrument.phase("load"):
        loaded = build_base(recipe)
    planned = Planner(config, profile_of(CPU), has_copy=lambda _: True).plan(recipe).phases[0]
    measured = instrument.phases[0].live_bytes
    assert planned.live_bytes == pytest.approx(measured, rel=0.01)
    del loaded
    assert planned.peak_bytes == pytest.approx(instrument.phases[0].peak_bytes, rel=0.01)
