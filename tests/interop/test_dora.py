"""DoRA (`adapter.method: dora`): PEFT reads ours, ours reads PEFT's, and the merge is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.adapters.dora import DoraLinear
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.errors import ModelError, ProblemsError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.combine import WeightedAdapter, combine
from qlora_cli.jobs import merge, verify
from qlora_cli.models.attach import attach_adapter, load_adapter
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_run
from qlora_cli.runs.run import Run
from tests.helpers.families import as_in_file
from tests.helpers.moe import make_moe
from tests.helpers.peft_helpers import (
    IDS,
    frozen_16_bit,
    load_into_peft,
    peft_logits,
    write_peft_adapter,
)
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
DORA = {"method": "dora"}
FILE = "adapter_model.safetensors"


def dora_run(folder: Path, recipe: Any) -> tuple[RunFolder, LoadedModel]:
    """Write a run whose adapter has random values in B and m."""
    run, loaded = make_run(folder, recipe, spread=0.05)
    for number, layer in enumerate(loaded.model.modules()):
        if isinstance(layer, DoraLinear):
            with torch.no_grad():
                for m in layer.lora_magnitude.values():
                    m.mul_(1 + 0.2 * torch.sin(torch.arange(len(m)) + number))
    save_adapter(loaded, recipe, run.adapter)
    return run, loaded


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all", ["q", "v"]], ids=str)
def test_peft_computes_the_same_logits(family: str, targets: Any, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, targets=targets, **DORA)
    run, loaded = dora_run(tmp_path / "run", recipe)
    ours = logits(loaded, IDS)
    peft = load_into_peft(base, run.adapter)
    torch.testing.assert_close(peft_logits(peft), ours, rtol=1e-4, atol=2e-3)
    opened = open_run(Run(run.path), CPU, Silent())
    assert torch.equal(logits(opened, IDS), ours)
    fresh = build_base(recipe)
    load_adapter(fresh, run.adapter)
    assert torch.equal(logits(fresh, IDS), ours)


@pytest.mark.parametrize(("family", "module"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_ours_reads_the_adapter_of_peft(family: str, module: str, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family)
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    folder = tmp_path / "adapter"
    write_peft_adapter(base, folder, r=2, target_modules=[module], use_dora=True, **transposed)
    tensors = load_file(folder / FILE)
    for name in tensors:
        if "magnitude" in name:
            tensors[name] *= torch.linspace(0.5, 2, len(tensors[name]))
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    loaded = build_base(recipe)
    attach_adapter(loaded, open_adapter(folder))
    expected = peft_logits(load_into_peft(base, folder))
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_the_merged_weight_is_the_formula_and_a_wrong_row_is_detected(
    family: str, kind: str, tmp_path: Path
) -> None:
    base, rows = make_base(tmp_path / "base", family), make_rows(tmp_path / "rows.jsonl")
    # 8 bit, so that the random model differs little from the original one.
    bits = 4 if kind == "dequantized" else 8
    adapter = {**DORA, "targets": ["v", "down"]}
    recipe = make_recipe(base, rows, base={"bits": bits}, adapter=adapter)
    run, loaded = dora_run(tmp_path / "run", recipe)
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype="float32", base=kind, observer=Silent())
    result = verify.run(out, against=run.path, observer=Silent())
    assert result.passed, result.faults
    merged, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    for path, layer in loaded.model.named_modules():
        if not isinstance(layer, DoraLinear):
            continue
        name = f"{path}.weight"
        plain = layer.base.dequantize() if kind == "dequantized" else original[name]
        weight = plain if kind == "dequantized" else as_in_file(family, plain)
        for role, span in layer.lora_slices.items():
            a, b = layer.lora_a[role].detach().double(), layer.lora_b[role].detach().double()
            total = weight[span].double() + layer.settings.scaling * b @ a
            m = layer.lora_magnitude[role].detach().double()
            expected = (m / total.norm(dim=1))[:, None] * total
            found = as_in_file(family, merged[name])[span]
            torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)
    in_file = as_in_file(family, merged[name])
    in_file[-1] *= 1.001
    save_file({key: value.contiguous() for key, value in merged.items()},
              out / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    result = verify.run(out, against=run.path, observer=Silent())
    assert not result.passed
    assert any(name in fault for fault in result.faults)


def test_an_adapter_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", targets=["q"], **DORA)
    run, _ = dora_run(tmp_path / "run", recipe)
    tensors = load_file(run.adapter / FILE)
    (name, *_) = [name for name in tensors if "magnitude" in name]
    wrong = {**tensors, name: tensors[name][1:].clone()}
    save_file(wrong, run.adapter / FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the magnitude vector has shape"):
        open_adapter(run.adapter)
    del tensors[name]
    save_file(tensors, run.adapter / FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 of 2 layers have a magnitude vector"):
        open_adapter(run.adapter)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(ModelError, match="use_dora: false"):
        open_adapter(run.adapter)


def test_dora_is_not_added_to_others_and_does_not_continue_lora(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", targets=["q"], **DORA)
    run, _ = dora_run(tmp_path / "run", recipe)
    adapter = open_adapter(run.adapter)
    with pytest.raises(UsageError, match="cannot be weighted or added"):
        combine([WeightedAdapter(adapter, 0.5)])
    plain = build_base(make_recipe(Path(recipe.model.name), tmp_path / "rows.jsonl",
                                   base={"bits": 16}, adapter={"targets": ["q"]}))  # fmt: skip
    with pytest.raises(ModelError, match="whether it is DoRA is True in the adapter"):
        load_adapter(plain, run.adapter)


@pytest.mark.slow
def test_dora_on_experts_is_refused(tmp_path: Path) -> None:
    base, rows = make_moe(tmp_path / "base", "qwen3_moe"), make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, adapter={**DORA, "targets": ["q", "experts"]})
    with pytest.raises(ProblemsError, match="DoRA is not supported on experts"):
        build_base(recipe)
