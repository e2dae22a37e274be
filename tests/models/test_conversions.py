"""Tensors of a checkpoint that transformers renames or stacks are found under their own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.files.source import FolderSource
from qlora_cli.models.build import skeleton
from qlora_cli.models.family import Family
from qlora_cli.nn.experts import StackPart
from qlora_cli.proof.small_config import small_config


def family_of(model_type: str) -> Family:
    return skeleton(small_config(AutoConfig.for_model(model_type)), torch.float32)[1]


def test_a_renamed_tensor_and_one_without_the_prefix() -> None:
    rename = family_of("gpt_neox").rename
    assert rename is not None
    assert rename("embed_out.weight") == "lm_head.weight"
    assert rename("layers.0.attention.dense.weight") == "gpt_neox.layers.0.attention.dense.weight"


def test_gate_and_up_are_halves_of_a_stack() -> None:
    stacks = family_of("mixtral").stacks
    experts = "model.layers.0.block_sparse_moe.experts"
    assert stacks["model.layers.0.mlp.experts.gate_up_proj"][2:4] == (
        StackPart(f"{experts}.1.w1.weight", 1, 0, 1),
        StackPart(f"{experts}.1.w3.weight", 1, 1, 2),
    )
    assert stacks["model.layers.0.mlp.experts.down_proj"][1] == (
        StackPart(f"{experts}.1.w2.weight", 1, 0, 2)
    )


def test_a_stack_that_a_checkpoint_stores_whole_has_no_parts() -> None:
    family = family_of("gpt_oss")
    assert family.experts == ("mlp.experts",)
    assert not family.stacks


def test_two_tensors_of_one_parameter_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="a and b belong to one parameter"):
        FolderSource(tmp_path, lambda _: "weight")


def test_stacks_in_another_order_of_rows_are_refused() -> None:
    with pytest.raises(ModelError, match=r"w13_weight is not a part .* in the order of its rows"):
        family_of("inkling2_text")
