"""GPT-2: Conv1D linears, stored as (in, out); one fused q/k/v projection; an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.models.family import Family, LinearSpec, MlpSpec
from qlora_cli.nn.mlp import Projections


def _qkv_rows(config: Any) -> Mapping[str, slice]:
    width = config.hidden_size
    return {role: slice(i * width, (i + 1) * width) for i, role in enumerate("qkv")}


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    backbone="transformer",
    blocks="transformer.h",
    head="lm_head",
    embeddings=("transformer.wte", "transformer.wpe"),
    linears=(
        LinearSpec("attn.c_attn", ("q", "k", "v"), transposed=True, rows=_qkv_rows),
        LinearSpec("attn.c_proj", ("o",), transposed=True),
        LinearSpec("mlp.c_fc", ("up",), transposed=True),
        LinearSpec("mlp.c_proj", ("down",), transposed=True),
    ),
    mlp=MlpSpec("mlp", Projections(gate=None, up="c_fc", down="c_proj"), "activation_function"),
    dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    # Causal masks: buffers in older checkpoints.
    ignored=(".attn.bias", ".attn.masked_bias"),
)
