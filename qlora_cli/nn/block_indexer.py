"""The choice of keys of Qwen4's sparse attention, for all tokens of a row at once.

Transformers' own code asks for each token which keys it may attend to. Without padding that is
known beforehand, so that a plan, which has no values, can run this code.

A key block has r consecutive tokens. A token attends to the blocks with the highest scores among
those that are complete before it, and to the tokens after them.

Letters: T tokens, H heads of the indexer, D their size, N = T / r complete blocks.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def select_keys(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Return a mask (1, 1, T, T): True for the keys that a token selects, apart from causality.

    module: transformers' indexer. hidden_states: (1, T, d) of one row.
    """
    length = hidden_states.shape[1]
    ratio, size = int(module.compress_ratio), int(module.index_head_dim)
    number = length // ratio
    device = hidden_states.device
    num_complete = (torch.arange(length, device=device) + 1) // ratio
    after = torch.arange(length, device=device) >= num_complete[:, None] * ratio
    if number == 0:
        return after[None, None]
    scores: Tensor = _scores(module, hidden_states, position_embeddings) / math.sqrt(size)
    is_complete = torch.arange(number, device=device) < num_complete[:, None]
    scores = scores.masked_fill(~is_complete, float("-inf"))
    chosen = scores.topk(min(module.block_topk, number), dim=-1).indices
    is_chosen = torch.zeros_like(is_complete).scatter(-1, chosen, True) & is_complete
    is_selected = is_chosen.repeat_interleave(ratio, dim=-1)
    is_selected = functional.pad(is_selected, (0, length - number * ratio))
    return (is_selected | after)[None, None]


def _scores(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the score (T, N) of each block for each token, float32."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = position_embeddings
    ratio, size = module.compress_ratio, module.index_head_dim
    number = hidden_states.shape[1] // ratio
    projected = module.index_qk_proj(hidden_states)
    q, k = projected.split([module.index_n_heads * size, module.index_kv_heads * size], dim=-1)
    q = module.q_layernorm(q.unflatten(-1, (-1, size)))
    q = rotate(q, cos=cos, sin=sin, unsqueeze_dim=2)
    blocks = k[:, : number * ratio].unflatten(1, (number, ratio)).float().mean(dim=2).to(k.dtype)
    blocks = module.k_layernorm(blocks).unsqueeze(2)
    starts = slice(0, number * ratio, ratio)
    blocks = rotate(blocks, cos=cos[:, starts], sin=sin[:, starts], unsqueeze_dim=2)
    products: Tensor = q[0].float() @ blocks[0, :, 0].float().t()
    return products.relu().sum(dim=1)
