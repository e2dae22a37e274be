"""One run of a model on meta shows what it uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.data.positions import check_seq_len, num_positions
from qlora_cli.errors import RecipeError
from qlora_cli.models.build import skeleton
from qlora_cli.models.family import Family
from qlora_cli.nn import attention
from qlora_cli.proof.small_config import small_config
from qlora_cli.recipe.schema import Data


def derived(model_type: str, **settings: Any) -> tuple[Any, Family]:
    config = small_config(AutoConfig.for_model(model_type, **settings))
    return skeleton(config, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "idle"),
    [
        ("olmo2", set()),
        ("whisper", {"encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"}),
        ("deepseek_v32", {"self_attn.indexer.wq_b", "self_attn.indexer.wk"}),
    ],
)
def test_linears_without_an_effect_get_no_adapter(model_type: str, idle: set[str]) -> None:
    """They belong to attention to an encoder, or they only choose the tokens to attend to."""
    _, family = derived(model_type)
    assert idle <= set(family.unquantized)
    assert bool(idle) or not family.unquantized
    assert not set(family.unquantized) & {spec.path for spec in family.linears}


@pytest.mark.parametrize(
    ("model_type", "own"), [("olmo2", False), ("doge", True), ("deepseek_v4", True)]
)
def test_a_model_that_needs_a_mask_gets_the_attention_of_transformers(
    model_type: str, own: bool
) -> None:
    model, family = derived(model_type)
    assert family.rows.own_attention == own
    assert model.config._attn_implementation == ("eager" if own else attention.NAME)
    assert bool(family.rows.mixers) == own


def test_a_model_that_adds_tokens_does_not_pack() -> None:
    assert not derived("cpmant")[1].rows.packs
    assert derived("olmo2")[1].rows.packs


def test_several_hidden_states_of_each_token_do_not_add_tokens() -> None:
    assert derived("gemma3n_text")[1].rows.packs


def test_parts_for_images_in_a_language_model_are_not_loaded() -> None:
    model, family = derived("git")
    assert family.others == ("git.image_encoder", "git.visual_projection")
    assert family.blocks == "git.encoder.layer"
    assert not hasattr(model.git, "image_encoder")


def test_the_language_of_the_rows_is_an_argument() -> None:
    settings = {"languages": ["en_XX", "de_DE"], "default_language": "de_DE", "is_decoder": True}
    _, family = derived("xmod", **settings)
    assert family.rows.arguments == {"lang_ids": 1}


def test_position_tables_that_count() -> None:
    _, family = derived("bart")
    assert not family.rows.takes_positions
    assert family.rows.counting_tables == ("model.decoder.embed_positions",)
    assert derived("opt")[1].rows.counting_tables == ()


@pytest.mark.parametrize(
    "model_type", ["bert", "data2vec-text", "roberta", "roberta-prelayernorm", "xmod", "camembert"]
)
def test_a_row_may_have_as_many_tokens_as_positions_are_left(model_type: str) -> None:
    """The data is checked by the config alone, the model by its table. They have to agree."""
    settings = {"default_language": "en_XX"} if model_type == "xmod" else {}
    config = small_config(AutoConfig.for_model(model_type, is_decoder=True, **settings))
    model, family = skeleton(config, torch.float32)
    table = next(
        m for n, m in model.named_modules() if n.endswith("embeddings.position_embeddings")
    )
    assert num_positions(config) == table.num_embeddings - family.rows.first_position
    with pytest.raises(RecipeError, match="the base has"):
        check_seq_len(Data(train="rows", seq_len=num_positions(config) + 1, packing=False), config)


def test_the_first_position_follows_that_of_padding() -> None:
    assert derived("roberta", is_decoder=True)[1].rows.first_position == 3
    assert derived("bert", is_decoder=True)[1].rows.first_position == 0
