"""Parameters with two names: in the checkpoint under one of them, in the model one object."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.files.source import WEIGHTS_FILE
from qlora_cli.models.build import build, skeleton
from qlora_cli.models.tying import shared_modules, tied_names
from qlora_cli.proof.small_config import small_config
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.tasks.causal import CAUSAL

BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def _renamed(small: SmallModel, change: dict[str, torch.Tensor], removed: str | None) -> None:
    file = Path(small.folder) / WEIGHTS_FILE
    tensors = {name: t for name, t in load_file(file).items() if name != removed}
    save_file({**tensors, **change}, file, {"format": "pt"})


@pytest.mark.parametrize("kept", ["first", "second", "both"])
def test_a_checkpoint_has_either_name_or_both(kept: str) -> None:
    with small_model(AutoConfig.for_model("bert", is_decoder=True), CAUSAL) as small:
        bias = load_file(Path(small.folder) / WEIGHTS_FILE)[BIAS]
        if kept != "first":
            _renamed(small, {DECODER_BIAS: bias.clone()}, BIAS if kept == "second" else None)
        loaded = build(small.request(small.recipe()))
        assert torch.equal(loaded.head.bias, bias.float())
        assert loaded.model.get_parameter(BIAS) is loaded.head.bias


def test_different_values_under_both_names_are_refused() -> None:
    with small_model(AutoConfig.for_model("bert", is_decoder=True), CAUSAL) as small:
        bias = load_file(Path(small.folder) / WEIGHTS_FILE)[BIAS]
        _renamed(small, {DECODER_BIAS: bias + 1}, None)
        with pytest.raises(ModelError, match="are one parameter"):
            build(small.request(small.recipe()))


def test_blocks_of_zamba_share_their_linears() -> None:
    kinds = ["linear_attention", "hybrid", "hybrid"]
    config = small_config(
        AutoConfig.for_model("zamba2", layers_block_type=kinds, num_hidden_layers=3)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    path = "shared_transformer.self_attn.q_proj"
    shared = shared_modules(model, tied_names(model, "lm_head", ()))
    assert shared[f"model.layers.2.{path}"] == f"model.layers.1.{path}"
    built, family = skeleton(config, torch.float32)
    first, second = (built.get_submodule(f"model.layers.{i}.{path}") for i in (1, 2))
    assert first is second
    assert family.tied == {}
