"""Llama and similar models: seven plain projections per block, RMSNorm, rotary positions."""

from __future__ import annotations

from dataclasses import replace

from qlora_cli.models.family import AttentionSpec, Family, LinearSpec, MlpSpec
from qlora_cli.nn.mlp import Projections

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
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
    mlp=MlpSpec("mlp", Projections(gate="gate_proj", up="up_proj", down="down_proj"), "hidden_act"),
    attention=AttentionSpec("self_attn", ("q_proj", "k_proj", "v_proj")),
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    dropouts=("attention_dropout",),
    ignored=(".rotary_emb.inv_freq",),
)

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    norms=(*LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"),
)
"""Also normalizes the queries and keys of each head."""
