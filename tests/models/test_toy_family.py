"""A new family is one `Family` and one entry in the registry: Starcoder2 is trained and merged.

The steps are those of CONTRIBUTING.md. Without the entry, the family of Starcoder2 is derived and
proved; its blocks have LayerNorms and an MLP without a gate, which no family of the registry
combines with separate q, k and v.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Starcoder2Config

from qlora_cli.events import Silent
from qlora_cli.jobs import merge, train, verify
from qlora_cli.models import registry
from qlora_cli.models.family import Family, LinearSpec
from tests.helpers.runs import make_recipe, make_rows, make_tokenizer

TOY = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    backbone="model",
    blocks="model.layers",
    head="lm_head",
    embeddings=("model.embed_tokens",),
    linears=(
        LinearSpec("self_attn.q_proj", ("q",)),
        LinearSpec("self_attn.k_proj", ("k",)),
        LinearSpec("self_attn.v_proj", ("v",)),
        LinearSpec("self_attn.o_proj", ("o",)),
        LinearSpec("mlp.c_fc", ("up",)),
        LinearSpec("mlp.c_proj", ("down",)),
    ),
    dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
    ignored=(".rotary_emb.inv_freq",),
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Starcoder2 with random weights and a tokenizer."""
    tokenizer = make_tokenizer()
    config = Starcoder2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.float16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_it_trains_and_merges_with_an_entry(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, TOY))
    rows = make_rows(tmp_path / "rows.jsonl")
    settings = {"steps": 2, "grad_accum": 1, "lr": 1e-2}
    recipe = make_recipe(base, rows, train=settings)
    recipe = recipe.model_copy(update={"output": str(tmp_path / "run")})
    trained = train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    assert trained.steps == 2
    out = tmp_path / "merged"
    merge.run(tmp_path / "run", out=out, dtype=None, base="dequantized", observer=Silent())
    result = verify.run(out, against=tmp_path / "run", observer=Silent())
    assert result.passed, result.faults
