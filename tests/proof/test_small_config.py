"""A small config keeps every kind of layer of the base's config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.proof.small_config import small_config


def small(model_type: str, **settings: Any) -> dict[str, Any]:
    content: dict[str, Any] = small_config(AutoConfig.for_model(model_type, **settings)).to_dict()
    return content


def test_one_layer_of_each_kind_is_kept() -> None:
    kinds = ["conv"] * 5 + ["full_attention"] + ["conv"] * 2
    assert small("lfm2", num_hidden_layers=8, layer_types=kinds)["layer_types"] == [
        "conv",
        "full_attention",
    ]


def test_numbers_of_layers_are_translated() -> None:
    content = small("bamba", num_hidden_layers=12, attn_layer_indices=[7, 9])
    assert content["num_hidden_layers"] == 2
    assert content["attn_layer_indices"] == [1]


def test_settings_of_single_layers_are_kept() -> None:
    content = small("gemma4_text")
    assert content["layer_types"] == ["sliding_attention", "full_attention"]
    assert content["num_kv_shared_layers"] == 0


def test_layers_that_share_keys_are_kept() -> None:
    content = small("gemma4_text", num_kv_shared_layers=18)
    assert content["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert content["num_kv_shared_layers"] == 2


def test_a_period_is_kept_completely() -> None:
    assert small("jamba", attn_layer_period=4, attn_layer_offset=2)["num_hidden_layers"] == 4


def test_the_heads_of_a_state_space_model_fit_its_width() -> None:
    content = small("mamba2")
    assert content["num_heads"] * content["head_dim"] == content["expand"] * content["hidden_size"]


def test_a_layer_keeps_the_sum_of_the_parts_of_its_heads() -> None:
    content = small("dots3_note_text")
    own = content["per_layer_config"]["2"]
    parts = (own["qk_nope_head_dim"], content["qk_rope_head_dim"])
    assert own["head_dim"] == sum(parts)
    assert own["qk_nope_head_dim"] != content["qk_nope_head_dim"]


def test_a_size_of_heads_that_the_config_states_gets_small() -> None:
    content = small("deberta-v2", hidden_size=1536, num_attention_heads=24, attention_head_size=64)
    assert content["attention_head_size"] * content["num_attention_heads"] == content["hidden_size"]


def test_the_configs_of_parts_get_small() -> None:
    content = small("git")
    assert content["vision_config"]["num_hidden_layers"] == 2
    attention = {"kv_n_heads": 8, "rope_theta": 500000.0}
    assert small("dbrx", attn_config=attention)["attn_config"]["kv_n_heads"] == 2


def test_sparse_attention_leaves_keys_out() -> None:
    """Otherwise the proof, with its short rows, would not run the choice of keys."""
    assert small("deepseek_v32")["index_topk"] < 9


def test_a_model_of_several_parts_is_refused() -> None:
    with pytest.raises(ModelError, match="several parts"):
        small("gemma3")
