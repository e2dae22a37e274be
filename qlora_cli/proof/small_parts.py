"""Shrinks the parts of a composed model's config next to its language model.

The proof never runs them. They only have to be created and stored, so that the merged checkpoint
has to keep them.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from qlora_cli.files.composed import TEXT
from qlora_cli.proof.sizes import SIZES

_SIZES = {
    **SIZES,
    "depth": 2,
    "embed_dim": 64,
    "num_hidden_layers": 2,
    "out_hidden_size": SIZES["hidden_size"],
    "image_size": 28,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "mm_tokens_per_image": 1,
}
_INDICES = ("fullatt_block_indexes", "deepstack_visual_indexes")


def small_whole(whole: Any) -> Any:
    """Return a copy of a composed config with small parts, except the language model."""
    small = deepcopy(whole)
    for key in whole.to_dict():
        part = getattr(whole, key, None)
        if hasattr(part, "to_dict") and key != TEXT:
            setattr(small, key, _small_part(part))
    return small


def _small_part(part: Any) -> Any:
    """Return a small config of the same class."""
    content = part.to_dict()
    changes: dict[str, Any] = {
        key: min(size, content[key])
        for key, size in _SIZES.items()
        if isinstance(content.get(key), int) and not isinstance(content[key], bool)
    }
    changes |= {key: [0] for key in _INDICES if content.get(key)}
    kept = {k: v for k, v in content.items() if k not in ("model_type", "transformers_version")}
    return type(part)(**{**kept, **changes})
