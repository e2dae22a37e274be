"""Check that a sequence is not longer than the base's positions."""

from __future__ import annotations

from typing import Any

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.recipe.schema import MIN_SEQ_LEN, Data
from qlora_cli.units import format_count

_AFTER_PADDING = (
    *("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "xmod"),
    *("data2vec-text", "mpnet", "ibert", "longformer"),
)
"""Model types whose first token has the position after that of the padding token."""


def num_positions(config: Any) -> int | None:
    """Return the maximum number of tokens in a sequence by a transformers config, or None."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    padding = getattr(config, "pad_token_id", None)
    if getattr(config, "model_type", None) in _AFTER_PADDING and padding is not None:
        return int(positions) - int(padding) - 1
    return int(positions)


def row_limit(data: Data, config: Any) -> int | None:
    """Return the base's positions if a packed sequence may be longer than them, else None."""
    positions = num_positions(config)
    return positions if positions is not None and data.seq_len > positions else None


def check_seq_len(data: Data, config: Any, prefix: int = 0) -> None:
    """Raise RecipeError if `data.seq_len` is larger than the base's number of positions.

    With packing it may be larger: positions start at 0 in each row, so only rows are limited.
    prefix: `adapter.prefix`, the number of positions before each row. With a prefix, `data.seq_len`
    and the prefix together must not exceed the positions, also with packing.
    Planning, `qlora data` and training call this, so they refuse the same recipes.
    """
    positions = num_positions(config)
    if positions is not None and prefix and data.seq_len + prefix > positions:
        total = f"{format_count(data.seq_len)} tokens and a prefix of {format_count(prefix)}"
        what = f"{total} are more than the base's {format_count(positions)} positions"
        hint = "set a shorter prefix"
        if (length := positions - prefix) >= MIN_SEQ_LEN:
            hint = f"set data.seq_len={length} or less, or a shorter prefix"
        raise RecipeError(
            "the sequences are longer than the base allows", [Problem("adapter.prefix", what, hint)]
        )
    if positions is None or data.packing or data.seq_len <= positions:
        return
    what = f"is {format_count(data.seq_len)}; the base has {format_count(positions)} positions"
    hint = f"set data.seq_len={positions} or less, or name a base with more positions"
    problem = Problem("data.seq_len", what, hint)
    raise RecipeError("the sequences are longer than the base allows", [problem])
