"""Settings with which small models of some types have the parts that tests need."""

from __future__ import annotations

from typing import Any

PROVED_SETTINGS: dict[str, dict[str, Any]] = {
    "roberta": {"is_decoder": True},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
    },
    "xmod": {"is_decoder": True, "languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
        "output_gate_type": "sigmoid",
    },
}
"""Model type -> settings of its config."""
