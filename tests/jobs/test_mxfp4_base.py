"""A base with experts in MXFP4: plan, train, merge and verify; other formats are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import merge, train, verify
from qlora_cli.jobs import plan as plan_job
from qlora_cli.models.checkpoint_source import open_source
from tests.helpers.moe import expert_recipe, make_moe
from tests.helpers.mxfp4 import quantize_experts
from tests.helpers.runs import build_base

STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share the proofs of one new cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path_factory.getbasetemp() / "mxfp4_cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_moe(tmp_path / "base", "gpt_oss", dtype=torch.bfloat16)
    quantize_experts(folder)
    return folder


@pytest.mark.slow
def test_the_base_is_trained_merged_and_verified(base: Path, tmp_path: Path) -> None:
    recipe = expert_recipe(base, tmp_path)
    planned = plan_job.run(recipe, device_profile=None, fit=False, compare=False)
    assert any("MXFP4" in note for note in planned.notes)
    trained = train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    loading, measured = planned.ledger.phases[0], trained.ledger.phases[0]
    assert loading.name == measured.name == "load"
    assert abs(loading.peak_bytes / measured.peak_bytes - 1) < 0.01
    run, out = tmp_path / "run", tmp_path / "merged"
    merge.run(run, out=out, dtype=None, base="original", observer=Silent())
    result = verify.run(out, against=run, observer=Silent())
    assert result.passed, result.faults
    merged = load_file(out / "model.safetensors")
    assert not any(name.endswith(("_blocks", "_scales")) for name in merged)
    assert merged[STACK].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_weights_are_the_decoded_ones(base: Path, tmp_path: Path) -> None:
    recipe = expert_recipe(base, tmp_path, base={"bits": 16})
    loaded = build_base(recipe)
    source = open_source(base, loaded.family)
    experts = loaded.model.get_submodule(STACK.rpartition(".")[0])
    found = experts.dequantized_stack("down_proj")
    assert torch.equal(found, source.read(STACK).to(found.dtype))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq"])
def test_other_formats_are_refused_by_name(method: str, base: Path) -> None:
    file = base / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match="(?i)already quantized .*" + method) as error:
        read_config(file)
    assert "16-bit model" in str(error.value)
