"""PiSSA and LoftQ (`adapter.init`): the law of the base, PEFT reads ours, the merge is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.peft_config import read_peft_config
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.errors import ProblemsError, UsageError
from qlora_cli.events import Silent
from qlora_cli.files.source import FolderSource
from qlora_cli.jobs import merge, verify
from qlora_cli.models.attach import load_adapter, remove_adapter
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.switch import AdapterSwitch
from qlora_cli.nn.quant import QuantLinear
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
    transformers_model,
)
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PISSA, LOFTQ = {"init": "pissa"}, {"init": "loftq"}
FILE = "adapter_model.safetensors"


def original(base: Path, family: str) -> dict[str, Tensor]:
    """Return name -> weight (out, in) of the base's file, float64."""
    tensors = load_file(base / "model.safetensors")
    return {n: as_in_file(family, t).double() for n, t in tensors.items() if t.dim() == 2}


def products(loaded: LoadedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return path -> (s B A, s B0 A0), both (out, in) float64."""
    found = {}
    for path, layer in adapted_layers(loaded.model):
        shape = (layer.base.out_features, layer.base.in_features)
        now, start = torch.zeros(shape).double(), torch.zeros(shape).double()
        for role, rows in layer.lora_slices.items():
            b, a = layer.lora_b[role].detach().double(), layer.lora_a[role].detach().double()
            now[rows] = layer.settings.scaling * b @ a
            factors = layer.initial[role]
            start[rows] = layer.settings.scaling * factors.b.double() @ factors.a.double()
        found[path] = (now, start)
    return found


def rounded(base: Path, family: str, loaded: LoadedModel) -> Path:
    """Write the base with R + s B0 A0 in place of W, and return its folder.

    R is the residual that the model has, which is rounded to 16 bit. So W changes by that rounding.
    """
    folder, tensors = base.with_name("rounded"), load_file(base / "model.safetensors")
    shutil.copytree(base, folder)
    for path, layer in adapted_layers(loaded.model):
        name, (_, start) = f"{path}.weight", products(loaded)[path]
        weight = (layer.base.weight.double() + start).float()
        before = as_in_file(family, tensors[name]).float()
        torch.testing.assert_close(weight, before, rtol=0, atol=2**-11 * float(before.abs().max()))
        tensors[name] = as_in_file(family, weight).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def distance_of_best(matrix: Tensor, rank: int) -> float:
    """Return the distance of a matrix from the best matrix of a rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"rslora": True, "ranks": {"q": 2, "down": 7}}),
        ("gpt2", {"targets": ["q", "v"]}),
    ],
)
def test_peft_adds_the_adapter_to_the_original_base(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, **{"targets": "all", **PISSA, **settings})
    run, loaded = make_run(tmp_path / "run", recipe)
    ours = logits(loaded, IDS)
    peft = load_into_peft(rounded(base, family, loaded), run.adapter)
    torch.testing.assert_close(peft_logits(peft), ours, rtol=1e-4, atol=1e-3)
    opened = open_run(Run(run.path), CPU, Silent())
    assert torch.equal(logits(opened, IDS), ours)
    remove_adapter(opened)
    untrained = build_base(recipe)
    assert torch.equal(logits(opened, IDS), logits(untrained, IDS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_splits_the_weight_into_its_principal_part_and_the_rest(
    family: str, tmp_path: Path
) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, **PISSA, targets=["q", "v", "down"])
    loaded = build_base(recipe)
    weights = original(base, family)
    for path, layer in adapted_layers(loaded.model):
        weight, (now, start) = weights[f"{path}.weight"], products(loaded)[path]
        assert torch.equal(now, start)
        held = layer.base.weight.double()
        # The residual was rounded once to the 16-bit storage of the base.
        torch.testing.assert_close(held, weight - start, rtol=2**-11, atol=1e-6)
        for rows in layer.lora_slices.values():
            best = distance_of_best(weight[rows], layer.settings.rank)
            assert (weight - start)[rows].norm() <= 1.002 * best


def test_pissa_begins_as_that_of_peft(tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, "llama", **PISSA, targets=["q", "down"], alpha=4.0)
    settings, file = recipe.adapter, base / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(("q_proj.weight", "down_proj.weight"))]:
        # The singular values of a random matrix are too close to each other to compare subspaces.
        u, s, v = torch.linalg.svd(tensors[name].float(), full_matrices=False)
        tensors[name] = (u * (s[0] * 0.7 ** torch.arange(len(s))) @ v).half()
    save_file(tensors, file, metadata={"format": "pt"})
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, init_lora_weights="pissa",
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    peft = get_peft_model(transformers_model(base), config)
    modules: Any = dict(peft.named_modules())
    for path, (now, _) in products(build_base(recipe)).items():
        expected = modules[f"base_model.model.{path}"].get_delta_weight("default").double()
        torch.testing.assert_close(now, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_error_of_quantization_is_lower(init: str, bits: int, tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    adapter = {"init": init, "rank": 8}
    loaded = build_base(make_recipe(base, rows, base={"bits": bits}, adapter=adapter))
    plain = build_base(make_recipe(base, rows, base={"bits": bits}))
    weights, linears = original(base, "llama"), dict(adapted_layers(plain.model))
    for path, layer in adapted_layers(loaded.model):
        weight, held = weights[f"{path}.weight"], layer.base.dequantize().double()
        now, _ = products(loaded)[path]
        before = weight - linears[path].base.dequantize().double()
        after = weight - held - now
        assert after.norm() < before.norm()
        if init == "loftq":
            assert torch.equal(held, linears[path].base.dequantize().double())
            assert after.norm() <= 1.002 * distance_of_best(before, layer.settings.rank)


@pytest.mark.parametrize("kind", ["original", "dequantized"])
@pytest.mark.parametrize(
    ("family", "init"), [("llama", "pissa"), ("gpt2", "pissa"), ("gpt2", "loftq")]
)
def test_the_merged_weight_is_the_formula_and_a_wrong_row_is_detected(
    kind: str, family: str, init: str, tmp_path: Path
) -> None:
    base, rows = make_base(tmp_path / "base", family), make_rows(tmp_path / "rows.jsonl")
    # 8 bit, so that the random model differs little from the original one.
    bits = 4 if kind == "dequantized" else 8
    adapter = {"init": init, "targets": ["v", "down"]}
    recipe = make_recipe(base, rows, base={"bits": bits}, adapter=adapter)
    # A of LoftQ is as small as the error, and the change should be larger than that.
    run, loaded = make_run(tmp_path / "run", recipe, spread=0.3 if init == "loftq" else 0.02)
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype="float32", base=kind, observer=Silent())
    result = verify.run(out, against=run.path, observer=Silent())
    assert result.passed, result.faults
    merged, weights = load_file(out / "model.safetensors"), original(base, family)
    for path, layer in adapted_layers(loaded.model):
        name, (now, start) = f"{path}.weight", products(loaded)[path]
        expected = layer.base.dequantize().double() + now
        if kind == "original":
            expected = weights[name] + now - start
        found = as_in_file(family, merged[name])
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)
    as_in_file(family, merged[name])[-1] *= 1.01
    save_file({key: value.contiguous() for key, value in merged.items()},
              out / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    result = verify.run(out, against=run.path, observer=Silent())
    assert any(name in fault for fault in result.faults)


def test_the_file_has_both_factors_and_is_plain_lora_for_others(tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, "gpt2", **PISSA, targets=["q", "v"], rslora=True)
    run, loaded = make_run(tmp_path / "run", recipe)
    config = read_peft_config(run.adapter)
    assert (config.r, config.init_lora_weights) == (2 * 2 * 3, True)
    (path, (now, start)), *_ = products(loaded).items()
    tensors = load_file(run.adapter / FILE)
    a, b = (tensors[f"base_model.model.{path}.lora_{f}.weight"].double() for f in "AB")
    torch.testing.assert_close(config.scaling(path) * b @ a, now - start, rtol=1e-6, atol=1e-8)
    # It continues as a plain adapter of twice the rank, on the original base.
    settings = {"rank": 6, "alpha": 6.0 * 2**0.5, "rslora": True, "targets": ["q", "v"]}
    plain = build_base(make_recipe(base, tmp_path / "rows.jsonl", base={"bits": 16},
                                   adapter=settings))  # fmt: skip
    load_adapter(plain, run.adapter)
    torch.testing.assert_close(logits(plain, IDS), logits(loaded, IDS), rtol=1e-4, atol=2e-3)


def switch_of(run: RunFolder, base: Path, *, merged: bool = False) -> AdapterSwitch:
    opened = open_run(Run(run.path), CPU, Silent())
    source: FolderSource = open_source(base, opened.family)
    return AdapterSwitch(opened, source, merged=merged)


def test_a_residual_takes_no_other_adapter(tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, "llama", **PISSA)
    run, _ = make_run(tmp_path / "run", recipe)
    with pytest.raises(UsageError, match="is a residual"):
        switch_of(run, base).add("other", open_adapter(run.adapter))
    with pytest.raises(UsageError, match="cannot be added to the residual"):
        switch_of(run, base, merged=True)
    with pytest.raises(UsageError, match="is not weighted or combined"):
        merge.run(
            run.path, out=tmp_path / "out", dtype=None, base="original", observer=Silent(),
            weight=0.5,
        )  # fmt: skip


def test_the_held_weights_do_not_depend_on_where_they_are(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    for init in ("pissa", "loftq"):
        recipe = make_recipe(base, rows, adapter={"init": init})
        host = make_recipe(base, rows, adapter={"init": init}, base={"residency": "host"})
        expected, found = products(build_base(recipe)), products(build_base(host))
        assert all(torch.equal(found[path][0], now) for path, (now, _) in expected.items())
        assert torch.equal(logits(build_base(host), IDS), logits(build_base(recipe), IDS))


def test_loftq_begins_a_linear_of_16_bit_with_b_zero(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    bits = {"bits": 4, "overrides": {"down": 16}}
    recipe = make_recipe(base, rows, base=bits, adapter=LOFTQ)
    plain = dict(adapted_layers(build_base(make_recipe(base, rows, base=bits)).model))
    for path, layer in adapted_layers(build_base(recipe).model):
        assert isinstance(layer.base, QuantLinear)
        for role, b in layer.lora_b.items():
            is_16_bit = path.endswith("down_proj")
            assert bool(b.any()) != is_16_bit
            assert torch.equal(layer.lora_a[role], plain[path].lora_a[role]) == is_16_bit


def test_a_rank_above_the_side_of_a_weight_is_refused(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, adapter={**PISSA, "rank": 64, "targets": ["q", "k"]})
    with pytest.raises(ProblemsError) as caught:
        build_base(recipe)
    assert "64 for k of model.layers.0.self_attn.k_proj, which is a matrix of 32 x 64" in str(
        caught.value
    )


@pytest.mark.slow
def test_experts_are_refused(tmp_path: Path) -> None:
    base, rows = make_moe(tmp_path / "base", "qwen3_moe"), make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, adapter={**PISSA, "targets": ["q", "experts"]})
    with pytest.raises(ProblemsError, match="adapters on experts begin with B = 0"):
        build_base(recipe)
