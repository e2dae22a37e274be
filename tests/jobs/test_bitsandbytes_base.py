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
from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.export.merge.merged_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.verify.tensor_checks import structure_faults, value_faults
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import train
from qlora_cli.models.limits import limits_of
from qlora_cli.runs.run import Run
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, make_run

FORMATS: dict[str, dict[str, Any]] = {
    "nested nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
LINEAR = "model.layers.1.mlp.up_proj"


def quantized_base(folder: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """Return (a checkpoint of bitsandbytes, path -> dequantized weight of each linear)."""
    base = make_base(folder / "plain", "llama", spread=0.1)
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


@pytest.mark.parametrize("name", FORMATS)
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
