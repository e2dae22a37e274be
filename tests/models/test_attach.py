"""Adapters are written and read exactly; each kind of wrong or damaged file has a clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.peft_config import PeftConfig, shortest_endings
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.errors import InputError, ModelError, ProblemsError, QloraError
from qlora_cli.models.attach import attach_adapter, load_adapter, remove_adapter
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.recipe.schema import Recipe
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import (
    build_base,
    logits,
    make_base,
    make_recipe,
    make_rows,
    randomize_b,
)

IDS = torch.tensor([[5, 80, 91, 7]])
BLOCKS = [f"model.layers.{n}.self_attn.{role}_proj" for n in range(12) for role in "qkvo"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_base(folder / family, family) for family in MODEL_TYPES}


def model_with_adapter(base: Path, **adapter: Any) -> tuple[Recipe, LoadedModel]:
    """Return (recipe, model with random values in B)."""
    recipe = make_recipe(base, base / "rows.jsonl", adapter=adapter)
    loaded = build_base(recipe)
    randomize_b(loaded)
    loaded.model.eval()
    return recipe, loaded


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("targets", ["all", ["q", "v"], ["k", "up"]], ids=str)
def test_a_written_adapter_is_read_exactly(
    bases: dict[str, Path], family: str, dtype: str, targets: Any, tmp_path: Path
) -> None:
    recipe, loaded = model_with_adapter(bases[family], dtype=dtype, targets=targets, rslora=True)
    save_adapter(loaded, recipe, tmp_path / "adapter")
    again = build_base(recipe)
    before = again.trainable()
    load_adapter(again, tmp_path / "adapter")
    trained = loaded.trainable()
    assert again.trainable().keys() == trained.keys() == before.keys()
    for name, parameter in again.trainable().items():
        assert parameter is before[name], "an optimizer refers to it"
        assert parameter.dtype == trained[name].dtype
        assert torch.equal(parameter, trained[name])


def test_a_fused_adapter_has_blocks_and_zeros(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, loaded = model_with_adapter(bases["gpt2"], targets=["q", "v"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 * recipe.adapter.rank
    assert config["lora_alpha"] / config["r"] == recipe.adapter.alpha / recipe.adapter.rank
    assert (config["target_modules"], config["fan_in_fan_out"]) == (["c_attn"], True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    rank, width = recipe.adapter.rank, b.shape[0] // 3
    assert b.shape[1] == 2 * rank
    assert not b[:width, rank:].any()
    assert not b[width : 2 * width].any()
    assert not b[2 * width :, :rank].any()


def test_an_adapter_can_be_replaced_and_removed(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, loaded = model_with_adapter(bases["gpt2"], targets=["q", "down"], rank=5)
    save_adapter(loaded, recipe, tmp_path / "adapter")
    _, other = model_with_adapter(bases["gpt2"], targets=["v", "up"])
    attach_adapter(other, open_adapter(tmp_path / "adapter"))
    assert other.adapted == loaded.adapted
    assert torch.equal(logits(other, IDS), logits(loaded, IDS))
    remove_adapter(other)
    remove_adapter(loaded)
    assert not list(adapted_layers(other.model))
    assert torch.equal(logits(other, IDS), logits(loaded, IDS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 4}, "rank is 3 in the adapter and 4 in the recipe"),
        ({"alpha": 7.0}, "scaling is 2.0 in the adapter and 2.33"),
        ({"dtype": "float16"}, "dtype is torch.float32 in the adapter and torch.float16"),
        ({"targets": ["q"]}, "the adapter and the recipe adapt other layers"),
    ],
    ids=str,
)
def test_another_recipe_is_refused(
    bases: dict[str, Path], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe, loaded = model_with_adapter(bases["llama"], targets=["q", "v"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    _, other = model_with_adapter(bases["llama"], **({"targets": ["q", "v"]} | changed))
    with pytest.raises(ModelError, match=message):
        load_adapter(other, tmp_path / "adapter")


def test_other_roles_of_a_fused_layer_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, loaded = model_with_adapter(bases["gpt2"], targets=["q", "v"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    _, other = model_with_adapter(bases["gpt2"], targets=["q", "k"])
    with pytest.raises(ModelError, match=r"roles is \['q', 'v'\] in the adapter and \['q', 'k'\]"):
        load_adapter(other, tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, loaded = model_with_adapter(bases["llama"], targets=["q"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    wide = make_base(tmp_path / "wide", "llama", hidden_size=80)
    with pytest.raises(
        ProblemsError, match=r"for a weight of shape \(64, 64\); the base has \(64, 80\)"
    ):
        load_adapter(model_with_adapter(wide, targets=["q"])[1], tmp_path / "adapter")
    with pytest.raises(ProblemsError, match="the base has no such linear"):
        load_adapter(model_with_adapter(bases["gpt2"], targets=["q"])[1], tmp_path / "adapter")


def test_a_full_disk_keeps_the_older_adapter(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, loaded = model_with_adapter(bases["llama"], targets=["q"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    randomize_b(loaded, seed=9)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QloraError, match="the adapter could not be written: No space left"):
        save_adapter(loaded, recipe, tmp_path / "adapter")
    after = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert after == before


Tensors = dict[str, Tensor]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
UNSUPPORTED: list[dict[str, Any]] = [
    {"peft_type": "IA3"},
    {"task_type": "TOKEN_CLS"},
    {"use_dora": True, "target_parameters": ["mlp.experts.down_proj"]},
    {"bias": "all"},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [1, 2]},
    {"layer_replication": [[0, 1]]},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "loftq"},
    {"something_new": {"depth": 3}},
    {"layers_to_transform": [0], "target_modules": "all-linear"},
]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture
def written(bases: dict[str, Path], tmp_path: Path) -> Path:
    """Return the folder of an adapter on q and v of two blocks, rank 3, which tests may damage."""
    recipe, loaded = model_with_adapter(bases["llama"], targets=["q", "v"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    return tmp_path / "adapter"


def check(folder: Path, base: Path) -> None:
    recipe = make_recipe(base, base / "rows.jsonl", adapter={"targets": ["q", "v"]})
    open_adapter(folder).check(build_base(recipe).sites)


@pytest.mark.parametrize("keys", UNSUPPORTED, ids=str)
def test_a_feature_that_is_not_supported_is_named(written: Path, keys: dict[str, Any]) -> None:
    edit(written, **keys)
    with pytest.raises(
        ModelError, match="uses settings that are not supported: " + next(iter(keys))
    ):
        open_adapter(written)


def test_settings_without_effect_are_ignored(written: Path, bases: dict[str, Path]) -> None:
    edit(written, peft_version="9.9", auto_mapping={"a": 1}, megatron_core="megatron.core")
    edit(written, use_dora=False, something_new=None, another=[], init_lora_weights="gaussian")
    check(written, bases["llama"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "an empty adapter: a file of .* bytes without a tensor"),
        (
            lambda t: {k.replace("layers", "model.layers"): v for k, v in t.items()},
            "the base has no such linear",
        ),
        (
            lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()},
            "lora_A.default.weight is not a LoRA factor",
        ),
        (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "is not a LoRA"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"}, "has lora_A alone"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith(Q0)}, "it has no weights"),
        (
            lambda t: t | {k.replace("q_p", "o_p"): v.clone() for k, v in t.items() if "q_p" in k},
            "adapter_config.json does not target it",
        ),
        (lambda t: t | {f"{Q0}.lora_A.weight": torch.zeros(5, 64)}, "rank 3 means A"),
        (lambda t: t | {f"{Q0}.lora_A.weight": torch.zeros(3, 64, 1)}, "rank 3 means A"),
        (lambda t: t | {f"{Q0}.lora_A.weight": torch.zeros(3, 60)}, "for a weight of shape"),
        (lambda t: t | {f"{Q0}.lora_A.weight": torch.zeros(3, 64).half()}, "A is torch.float16"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "A is torch.int8"),
    ],
)
def test_wrong_tensors_are_named(
    written: Path,
    bases: dict[str, Path],
    change: Callable[[Tensors], Tensors],
    message: str,
) -> None:
    rewrite(written, change)
    with pytest.raises(InputError, match=message):
        check(written, bases["llama"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"lora_alpha": "much"}, "lora_alpha: Input should be a valid number"),
        ({"target_modules": None}, "target_modules: "),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"rank_pattern": {"[": 3}}, "is not a regular expression"),
        ({"layers_pattern": ["h", "("]}, "layers_pattern: '\\(' is not a name"),
        ({"rank_pattern": {r"(q)\1": 3}}, "cannot be used: groupref is not supported"),
        ({"lora_alpha": 60.0}, "scales it by 20 at rank 3, but its weights were written for 2 at"),
        ({"use_rslora": True}, "but its weights were written for"),
    ],
    ids=str,
)
def test_a_wrong_config_is_named(written: Path, keys: dict[str, Any], message: str) -> None:
    edit(written, **keys)
    with pytest.raises(ModelError, match=message):
        open_adapter(written)


def test_missing_files_and_broken_json_are_named(written: Path) -> None:
    weights = written / "adapter_model.safetensors"
    weights.rename(written / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        open_adapter(written)
    (written / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json: Invalid JSON"):
        open_adapter(written)
    (written / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"adapter_config\.json: Input should be a valid dict"):
        open_adapter(written)
    (written / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        open_adapter(written)


def test_values_outside_the_blocks_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, loaded = model_with_adapter(bases["gpt2"], targets=["q", "v"])
    save_adapter(loaded, recipe, tmp_path / "adapter")
    content = bytearray((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    at = bytes(content).find(tensors[name].numpy().tobytes())
    content[at + 4 * recipe.adapter.rank + 3] = 0x3F  # the first row's first value for v
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
    layer = open_adapter(tmp_path / "adapter").layers["transformer.h.0.attn.c_attn"]
    with pytest.raises(ModelError, match="B has values outside the blocks of q, v"):
        layer.read()


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ([path for path in BLOCKS if path.endswith("q_proj")], ["q_proj"]),
        (BLOCKS, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (["model.layers.1.self_attn.q_proj"], ["1.self_attn.q_proj"]),
        (["model.layers.1.self_attn.q_proj", "head.q_proj"], ["1.self_attn.q_proj", "head.q_proj"]),
    ],
)
def test_endings_are_as_short_as_possible(chosen: list[str], names: list[str]) -> None:
    others = ["model", "model.layers.1", "head.q_proj"] if len(chosen) < 3 else ["model"]
    assert shortest_endings(chosen, [*BLOCKS, *others]) == names


def test_endings_match_exactly_the_chosen_modules() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        picks = torch.rand(len(BLOCKS), generator=generator) < torch.rand(1, generator=generator)
        chosen = {path for path, pick in zip(BLOCKS, picks.tolist(), strict=True) if pick}
        config = PeftConfig(r=1, lora_alpha=1.0, target_modules=shortest_endings(chosen, BLOCKS))
        assert {path for path in BLOCKS if config.targets(path)} == chosen


def test_the_chat_template_of_the_training_is_written_next_to_the_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    save_adapter(build_base(recipe), recipe, tmp_path / "own", "{{ messages }}")
    save_adapter(build_base(recipe), recipe, tmp_path / "bases")
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "bases" / "chat_template.jinja").exists()
