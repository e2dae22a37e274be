"""The sizes of a small config, by the keys that the configs of transformers use."""

from __future__ import annotations

from collections.abc import Mapping

_VOCABULARY = (
    *("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "shape_vocab_size"),
    "pronunciation_vocab_size",
)
_WIDTH = (
    *("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "lru_width"),
    *("embedding_dim", "dim", "pooler_hidden_size"),
)
_INNER = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff", "dim_ff"),
    *("decoder_ffn_dim", "dense_intermediate_size", "prefix_dense_intermediate_size"),
    *("intermediate_size_mlp", "hidden_dim"),
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"),
    *("max_target_positions", "n_ctx", "context_length"),
)
_HEAD_SIZE = (
    *("head_dim", "swa_head_dim", "attention_head_dim", "d_head", "kv_channels"),
    "attention_head_size",
)
_EXPERTS = (
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    *("num_routed_experts",),
)
ACTIVE_EXPERTS = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    *("moe_top_k",),
)
_EXPERT_WIDTH = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    "shared_experts_intermediate_size",
)
_ONE = ("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups")
_LATENT = ("q_lora_rank", "qk_latent_size", "o_lora_rank")
_STATE = (
    *("state_size", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"),
)
_WINDOW = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "window_size"),
    *("local_attention", "attention_chunk_size"),
)
_INDEXER_HEAD_SIZE = ("index_head_dim", "indexer_head_dim")
_SELECTED = ("index_topk", "indexer_budget")

SIZES: Mapping[str, int] = {
    **dict.fromkeys(_VOCABULARY, 128),
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_INNER, 96),
    "expansion_ratio": 2,
    **dict.fromkeys(_HEADS, 4),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 4,
    **dict.fromkeys(_HEAD_SIZE, 16),
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **dict.fromkeys(_POSITIONS, 64),
    "original_max_position_embeddings": 32,
    **dict.fromkeys(_WINDOW, 4),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(ACTIVE_EXPERTS, 2),
    **dict.fromkeys(_EXPERT_WIDTH, 32),
    **dict.fromkeys(_ONE, 1),
    **dict.fromkeys(_LATENT, 32),
    "kv_lora_rank": 16,
    **dict.fromkeys(_STATE, 8),
    **dict.fromkeys(_INDEXER_HEAD_SIZE, 16),
    "index_n_heads": 2,
    "indexer_n_heads": 4,
    **dict.fromkeys(_SELECTED, 4),
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "hidden_size_per_layer_input": 16,
    "pronunciation_embed_dim": 16,
    "shape_embed_dim": 16,
    "adapter_rank": 8,
    "kv_n_heads": 2,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
}
"""Key of a config -> its value in the small config, if the base's value is larger."""
