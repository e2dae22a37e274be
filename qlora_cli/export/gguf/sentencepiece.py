"""Describe a SentencePiece BPE tokenizer for llama.cpp, which calls this kind `llama`.

In tokenizer.json it is a BPE with byte fallback. In a GGUF file it has no merges but one score per
token: llama.cpp merges any two neighbours that form a token, the highest score first. The scores
are computed from the order of the merges. This is possible only if both give the same result: the
merges of each token have consecutive ranks, and no pair that forms a token is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType

from qlora_cli.export.gguf.unsupported import unsupported

_SPACE = "▁"


def mark_special_types(
    definition: Mapping[str, Any], types: list[TokenType], unknown: int | None
) -> None:
    """Set the types of the byte tokens and of the unknown token.

    definition: the content of tokenizer.json.
    types: one entry per row of the embedding; changed in place.
    unknown: id of the unknown token, if there is one.

    Raises UsageError if a byte has no token.
    """
    ids = definition["model"]["vocab"]
    byte_tokens = {f"<0x{number:02X}>" for number in range(256)}
    if not ids.keys() >= byte_tokens:
        raise unsupported("the tokenizer lacks a token for some byte")
    for token in byte_tokens:
        types[ids[token]] = TokenType.BYTE
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN


def token_scores(
    definition: Mapping[str, Any], tokens: Sequence[str], types: Sequence[TokenType]
) -> list[float]:
    """Return one score per token: minus the rank of its first merge.

    definition: the content of tokenizer.json.
    tokens, types: text and type of each row of the embedding.

    Raises UsageError if scores cannot express the merges.
    """
    model = definition["model"]
    normal = {
        token for token, number in model["vocab"].items() if types[number] == TokenType.NORMAL
    }
    ranks = _ranks(normal, [tuple(pair) for pair in model["merges"]])
    # llama.cpp never uses the score of a token that no merge forms.
    return [-float(ranks.get(token, 0)) for token in tokens]


def _ranks(tokens: set[str], merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Return the rank of the first merge of each token. Raises UsageError (see the module)."""
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    known = set(merges)
    is_complete = all(pair in known for token in tokens for pair in _halves(token, tokens))
    is_consecutive = all(own[-1] - own[0] < len(own) for own in ranks.values())
    if not is_complete or not is_consecutive:
        raise unsupported(
            "the tokenizer's merges are not in the order of its tokens, as SentencePiece's are"
        )
    return {token: own[0] for token, own in ranks.items()}


def _halves(token: str, tokens: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of tokens or single characters that llama.cpp would merge to `token`."""
    for cut in range(1, len(token)):
        pair = token[:cut], token[cut:]
        if all(len(half) == 1 or half in tokens for half in pair):
            yield pair


def adds_space_prefix(definition: Mapping[str, Any], notes: list[str]) -> bool:
    """Return whether the tokenizer adds a space at the beginning of a text.

    definition: the content of tokenizer.json.
    notes: a line is added for each difference between llama.cpp and the tokenizer.

    Raises UsageError if the tokenizer changes texts in another way.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizer, pre_tokenizer = definition["normalizer"], definition["pre_tokenizer"]
    if pre_tokenizer is None:
        if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
            return True
        if normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
            return False
    elif normalizer is None and pre_tokenizer["type"] == "Metaspace":
        scheme, split = pre_tokenizer.get("prepend_scheme"), pre_tokenizer.get("split", True)
        if pre_tokenizer["replacement"] == _SPACE and not split:
            if scheme == "first":
                notes.append(
                    "llama.cpp adds a space after every special token within a text; this "
                    "tokenizer adds one at the beginning of a text only"
                )
            return bool(scheme != "never")
    raise unsupported("the tokenizer changes texts in a way that llama.cpp does not support")
