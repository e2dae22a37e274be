"""Every option that PEFT can write is obeyed, with equal logits, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.models.attach import attach_adapter
from qlora_cli.runs.open import open_for_adapters
from qlora_cli.runs.run import adapter_at
from tests.helpers.families import MODEL_TYPES
from tests.helpers.peft_helpers import (
    IDS,
    frozen_16_bit,
    load_into_peft,
    peft_logits,
    transformers_model,
    write_peft_adapter,
)
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

# PEFT 0.21 uses an attribute that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PEFT_LLAMA: dict[str, dict[str, Any]] = {
    "names": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "expression": {"r": 2, "target_modules": r".*layers\.1\.mlp\.(up|gate)_proj"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"o_proj": 2, "layers.0.self_attn.q_proj": 7},
        "alpha_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 1},
    },
    "rslora patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"v_proj": 5},
    },
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.v_proj"],
    },
    "one layer by its list's name": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "a complete path in addition to some layers": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.k_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "complete paths": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"],
        "alpha_pattern": {r"^model\.layers\.1\.mlp\.up_proj": 9},
    },
    "excluded by an expression": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*\.0\..*q_proj",
    },
    "the first pattern that fits": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"(q|k)_proj": 3, "q_proj": 5},
        "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 2, ".*_proj": 7},
    },
    "parameters": {
        "r": 4,
        "target_modules": ["q_proj"],
        "target_parameters": ["down_proj.weight", "up_proj.weight"],
    },
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "random": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False},
}
PEFT_GPT2: dict[str, dict[str, Any]] = {
    "fused": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "all": {
        "r": 3,
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True,
        "use_rslora": True,
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "rank_pattern": {"c_attn": 7},
        "alpha_pattern": {r"h\.1\.attn\.c_attn": 3, r"h\.0\.mlp\.c_fc": 11},
    },
    "some layers": {
        "r": 4,
        "target_modules": ["c_attn", "transformer.h.1.mlp.c_proj"],
        "fan_in_fan_out": True,
        "layers_to_transform": [0],
        "layers_pattern": "h",
    },
    "all linear": {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": True},
}
PEFT_WRITES = [("llama", name) for name in PEFT_LLAMA] + [("gpt2", name) for name in PEFT_GPT2]


OTHERS = [
    (family, name)
    for family in ("mistral", "qwen2", "qwen3")
    for name in ("names", "rslora patterns", "patterns", "complete paths", "excluded")
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [*PEFT_WRITES, *OTHERS])
def test_qlora_loads_adapters_of_peft(family: str, name: str, tmp_path: Path) -> None:
    settings = PEFT_GPT2[name] if family == "gpt2" else PEFT_LLAMA[name]
    base, recipe = frozen_16_bit(tmp_path, family)
    write_peft_adapter(base, tmp_path / "theirs", **settings)
    # Read back, because PEFT sorts patterns when it writes them, and the first match is used.
    wanted = peft_logits(load_into_peft(base, tmp_path / "theirs"))
    loaded = build_base(recipe)
    attach_adapter(loaded, open_adapter(tmp_path / "theirs"))
    loaded.model.eval()
    torch.testing.assert_close(logits(loaded, IDS), wanted, rtol=1e-4, atol=1e-3)
    in_file = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert len(in_file) == sum(2 * len(roles) for roles in loaded.adapted.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_qlora_loads_16_bit_factors(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = PEFT_GPT2["patterns"] if family == "gpt2" else PEFT_LLAMA["patterns"]
    base, recipe = frozen_16_bit(tmp_path, family)
    write_peft_adapter(base, tmp_path / "theirs", **settings)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    wanted = peft_logits(load_into_peft(base, tmp_path / "theirs"))
    loaded = build_base(recipe)
    attach_adapter(loaded, open_adapter(tmp_path / "theirs"))
    torch.testing.assert_close(logits(loaded, IDS), wanted, rtol=1e-4, atol=1e-3)


MIXED: dict[str, list[str]] = {
    "gpt2": ["v", "transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_fc"],
    "llama": ["q", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"],
}
"""Roles and exact paths. On GPT-2 one fused linear has one part and the other three, so the file
needs rank and alpha patterns."""


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_peft_loads_our_exact_paths(family: str, rslora: bool, tmp_path: Path) -> None:
    targets = MIXED.get(family, MIXED["llama"])
    base, recipe = frozen_16_bit(tmp_path, family, targets=targets, rslora=rslora)
    run, loaded = make_run(tmp_path / "run", recipe)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    patterned = {"rank_pattern", "alpha_pattern"} if family == "gpt2" else set()
    assert {key for key in ("rank_pattern", "alpha_pattern") if config[key]} == patterned
    found = peft_logits(load_into_peft(base, run.adapter))
    torch.testing.assert_close(found, logits(loaded, IDS), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_trained_on_a_packed_base_has_equal_logits_on_the_16_bit_base(
    family: str, bits: int, tmp_path: Path
) -> None:
    """Compares PEFT and qlora, both on the 16-bit base."""
    base = make_base(tmp_path / "base", family)
    rows = make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, base={"bits": bits}, adapter={"targets": ["q", "v", "up"]})
    run, trained = make_run(tmp_path / "run", recipe)
    ours = open_for_adapters(str(base), CPU, Silent()).loaded
    attach_adapter(ours, adapter_at(run.path))
    found = peft_logits(load_into_peft(base, run.adapter))
    torch.testing.assert_close(found, logits(ours, IDS), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits(trained, IDS), found, rtol=1e-2, atol=0.1), "bases differ"


REFUSED: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "bias of the adapted": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "init_lora_weights olora": {"init_lora_weights": "olora"},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
}


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_an_unsupported_option_of_peft_is_refused(option: str, tmp_path: Path) -> None:
    base, _ = frozen_16_bit(tmp_path, "llama")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **REFUSED[option]}
    write_peft_adapter(base, tmp_path / "theirs", **settings)
    name = option.split()[0]
    with pytest.raises(ModelError, match=f"uses settings that are not supported: {name}"):
        open_adapter(tmp_path / "theirs")


OTHER_METHODS: dict[str, Any] = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_refused(method: str, tmp_path: Path) -> None:
    base, _ = frozen_16_bit(tmp_path, "llama")
    get_peft_model(transformers_model(base), OTHER_METHODS[method]()).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(ModelError, match=f'not supported: peft_type: "{method}"'):
        open_adapter(tmp_path / "theirs")


def test_weights_other_than_the_factors_are_refused(tmp_path: Path) -> None:
    base, _ = frozen_16_bit(tmp_path, "llama")
    model = get_peft_model(transformers_model(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"lm_head\.weight is not a LoRA factor"):
        open_adapter(tmp_path / "theirs")


OPTIONS = {field.name for field in dataclasses.fields(LoraConfig)}
DECIDED = peft_config.PeftConfig.model_fields.keys() | peft_config._INERT


def test_no_option_is_ignored(tmp_path: Path) -> None:
    """Each option is obeyed, is known to change nothing, or is refused if it is set."""
    base, _ = frozen_16_bit(tmp_path, "llama")
    write_peft_adapter(base, tmp_path / "theirs", r=4, target_modules=["q_proj"])
    file = tmp_path / "theirs" / "adapter_config.json"
    written = json.loads(file.read_text())
    assert len(OPTIONS - DECIDED) > 10
    for option in OPTIONS - DECIDED:
        file.write_text(json.dumps({**written, option: {"some": "value"}}))
        with pytest.raises(ModelError, match=f"not supported: {option}"):
            open_adapter(tmp_path / "theirs")
