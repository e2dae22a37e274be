"""PEFT loads qlora's adapters and qlora loads PEFT's: the same tensors and equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.events import Silent
from qlora_cli.models.attach import attach_adapter
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.runs.open import open_run
from qlora_cli.runs.run import Run
from tests.helpers.families import MODEL_TYPES, as_in_file
from tests.helpers.peft_helpers import (
    IDS,
    frozen_16_bit,
    load_into_peft,
    peft_logits,
    transformers_model,
    write_peft_adapter,
)
from tests.helpers.runs import CPU, build_base, logits, make_run, randomize_b

# PEFT 0.21 uses an attribute that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS: list[Any] = ["all", ["q", "v"], ["q", "o", "down"], ["k"]]


def assert_same_keys(model: Any, adapter: Path) -> None:
    """Check that PEFT's model has exactly the LoRA tensors of the file."""
    in_file = load_file(adapter / "adapter_model.safetensors")
    peft_tensors = {
        name.replace(".default", ""): value
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }
    assert peft_tensors.keys() == in_file.keys()
    assert all(torch.equal(peft_tensors[name], in_file[name]) for name in in_file)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_peft_loads_ours(family: str, rslora: bool, targets: Any, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, targets=targets, rslora=rslora)
    run, loaded = make_run(tmp_path / "run", recipe)
    model = load_into_peft(base, run.adapter)
    assert_same_keys(model, run.adapter)
    ours = logits(loaded, IDS)
    torch.testing.assert_close(peft_logits(model), ours, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(peft_logits(transformers_model(base)), ours, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_merges_ours_to_the_same_weights(family: str, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family)
    run, loaded = make_run(tmp_path / "run", recipe)
    merged = load_into_peft(base, run.adapter).merge_and_unload().state_dict()
    original = transformers_model(base).state_dict()
    for path, layer in adapted_layers(loaded.model):
        delta = as_in_file(family, layer.delta())
        found = merged[f"{path}.weight"] - original[f"{path}.weight"]
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-6)


def test_a_fused_adapter_of_peft_has_one_part(tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, "gpt2")
    write_peft_adapter(
        base, tmp_path / "theirs", r=4, target_modules=["c_attn"], fan_in_fan_out=True
    )
    loaded = build_base(recipe)
    attach_adapter(loaded, open_adapter(tmp_path / "theirs"))
    assert set(map(tuple, loaded.adapted.values())) == {("qkv",)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_may_contain_an_adapter_that_peft_wrote(family: str, tmp_path: Path) -> None:
    """PEFT loads the run's adapter, changes it and saves it again. The run then matches PEFT."""
    base, recipe = frozen_16_bit(tmp_path, family, targets=["q", "v"])
    run, _ = make_run(tmp_path / "run", recipe)
    model = PeftModel.from_pretrained(transformers_model(base), run.adapter, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.01
    wanted = peft_logits(model)
    model.save_pretrained(run.adapter)
    loaded = open_run(Run(run.path), CPU, Silent())
    torch.testing.assert_close(logits(loaded, IDS), wanted, rtol=1e-4, atol=1e-3)


def round_trip(loaded: LoadedModel, recipe: Any, folder: Path) -> LoadedModel:
    """Save an adapter, load it into PEFT, save it there and load it again.

    PEFT stores float16 factors in float32.
    """
    save_adapter(loaded, recipe, folder / "ours")
    model = load_into_peft(Path(recipe.model.name), folder / "ours")
    model.save_pretrained(folder / "theirs")
    back = build_base(recipe)
    attach_adapter(back, open_adapter(folder / "theirs"))
    return back


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_round_trip_through_peft_is_exact(family: str, dtype: str, tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, family, dtype=dtype)
    loaded = build_base(recipe)
    randomize_b(loaded)
    back = round_trip(loaded, recipe, tmp_path)
    ours, found = dict(adapted_layers(loaded.model)), dict(adapted_layers(back.model))
    assert ours.keys() == found.keys()
    for path, layer in ours.items():
        torch.testing.assert_close(found[path].delta(), layer.delta(), rtol=1e-5, atol=1e-7)
