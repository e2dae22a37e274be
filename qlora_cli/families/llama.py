"""Llama and what shares its shape: seven plain projections a block, RMSNorm, rotary positions."""

from __future__ import annotations

from qlora_cli.families.spec import Family, LinearSpec

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    backbone="model",
    blocks="model.layers",
    head="lm_head",
    embeddings=("model.embed_tokens",),
    linears=(
        LinearSpec("self_attn.q_proj", ("q",)),
        LinearSpec("self_attn.k_proj", ("k",)),
        LinearSpec("self_attn.v_proj", ("v",)),
        LinearSpec("self_attn.o_proj", ("o",)),
        LinearSpec("mlp.gate_proj", ("gate",)),
        LinearSpec("mlp.up_proj", ("up",)),
        LinearSpec("mlp.down_proj", ("down",)),
    ),
    dropouts=("attention_dropout",),
    ignored=(".rotary_emb.inv_freq",),
)
