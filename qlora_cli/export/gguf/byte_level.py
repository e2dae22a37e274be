"""Describe a byte-level BPE tokenizer for llama.cpp, which calls this kind `gpt2`.

Before BPE, the tokenizer splits a text into words. llama.cpp has this step in its own code and
selects it by a name (`tokenizer.ggml.pre`). llama.cpp's converter finds the name by hashing the ids
of a test text. Here the name is found by the definition of the step, which also works for an
extended vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers

from qlora_cli.export.gguf.unsupported import unsupported

_WORDS, _DIGITS = "words", "digits"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PRE_NAMES: Mapping[tuple[str, ...], tuple[str, bool]] = {
    (_WORDS,): ("gpt-2", False),
    (_DIGITS, _WORDS): ("smollm", False),
    (rf"{_CLITICS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): ("llama-bpe", True),
    (rf"{_CLITICS}|{_LETTERS}|\p{{N}}|{_REST}",): ("qwen2", False),
}
"""Steps that split a text into words -> (llama.cpp's name, whether llama.cpp skips the merges for a
word that is a token)."""
_BYTE_TOKENS = frozenset(pre_tokenizers.ByteLevel.alphabet())


def byte_level_name(definition: Mapping[str, Any], notes: list[str]) -> str:
    """Return llama.cpp's name for the way a byte-level tokenizer splits text into words.

    definition: the content of tokenizer.json.
    notes: a line is added for each difference between llama.cpp and the tokenizer.

    Raises UsageError if llama.cpp does not tokenize as this tokenizer does.
    """
    model = definition["model"]
    if not model["merges"]:
        raise unsupported("the tokenizer has no merges")
    num_missing = len(_BYTE_TOKENS - set(model["vocab"]))
    if num_missing:
        if model.get("unk_token") is not None:
            raise unsupported("the tokenizer lacks a token for some byte and has an unknown token")
        # Without an unknown token, llama.cpp and the tokenizer both leave such a byte out. SmolLM2
        # lacks bytes that are not used in UTF-8, and some control characters.
        notes.append(
            f"the tokenizer has no token for {num_missing} byte values; like the tokenizer, "
            "llama.cpp leaves these bytes out of a text"
        )
    normalizer = definition["normalizer"]
    if normalizer is not None:
        if normalizer != {"type": "NFC"}:
            raise unsupported(f"llama.cpp has no normalizer {normalizer['type']}")
        notes.append("llama.cpp does not compose accents (NFC) before it tokenizes a text")
    steps = _steps(definition["pre_tokenizer"])
    name, ignores_merges = _PRE_NAMES.get(steps, (None, False))
    if name is None or ignores_merges != bool(model.get("ignore_merges")):
        raise unsupported("llama.cpp has no name for the way the tokenizer splits text into words")
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a byte-level pre-tokenizer. Raises UsageError for any other kind."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise unsupported("the tokenizer is neither byte-level nor has it byte fallback")
    names = [_step_name(step) for step in steps[:-1]]
    return (*names, _WORDS) if last.get("use_regex", True) else tuple(names)


def _step_name(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGITS
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return str(step["pattern"].get("Regex"))
    return str(step["type"])
