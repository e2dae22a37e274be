"""Describe a model's tokenizer for llama.cpp, or refuse it.

llama.cpp tokenizes texts with its own code. So a tokenizer can be written only if that code does
what the tokenizer does. Two kinds are supported: byte-level BPE (`byte_level.py`) and SentencePiece
BPE (`sentencepiece.py`). Any other kind is refused, because a model with another tokenizer would
run and produce wrong text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.export.gguf.byte_level import byte_level_name
from qlora_cli.export.gguf.sentencepiece import (
    adds_space_prefix,
    mark_special_types,
    token_scores,
)
from qlora_cli.export.gguf.unsupported import unsupported

_REFUSED_BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's metadata in a GGUF file.

    kind: `gpt2` (byte-level) or `llama` (SentencePiece).
    pre: llama.cpp's name for the way text is split into words.
    tokens, types: text and type of each row of the embedding.
    special: role (`bos`, `eos`, ...) -> token id.
    adds: role -> whether this token is added to a text.
    template: the chat template, if there is one.
    scores: one per token; only for `llama`.
    merges: pairs of tokens; only for `gpt2`.
    space_prefix: whether a space is added before a text; only for `llama`.
    notes: differences between llama.cpp and the tokenizer, one line each.
    """

    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    template: str | None
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer's metadata to a GGUF file."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        for role, is_added in self.adds.items():
            getattr(writer, f"add_add_{role}_token")(is_added)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, num_rows: int) -> Vocabulary:
    """Return the tokenizer of a model as llama.cpp needs it.

    folder: the model's folder. num_rows: number of rows of the model's embedding.

    Raises UsageError if llama.cpp would tokenize texts differently, ModelError if the tokenizer is
    damaged.
    """
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None:
        raise unsupported("the model has no tokenizer")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or any(model.get(key) for key in _REFUSED_BPE_OPTIONS):
        raise unsupported(f"llama.cpp does not support this kind of {model['type']} tokenizer")
    tokens, types = _tokens(tokenizer, num_rows)
    notes: list[str] = []
    special = _special(tokenizer, folder, notes)
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "adds": _added(tokenizer, special),
        "template": _template(tokenizer, notes),
        "notes": notes,
    }
    if model.get("byte_fallback"):
        mark_special_types(definition, types, special.get("unk"))
        scores = token_scores(definition, tokens, types)
        prefix = adds_space_prefix(definition, notes)
        return Vocabulary("llama", "default", scores=scores, space_prefix=prefix, **common)
    name = byte_level_name(definition, notes)
    merges = [" ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", name, merges=merges, **common)


def _tokens(tokenizer: Any, num_rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and the type of every row of the embedding.

    A row without a token gets a placeholder text and the type UNUSED.

    Raises UsageError if the tokenizer has more tokens than the embedding has rows, or tokens that
    llama.cpp does not support.
    """
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= num_rows:
        raise unsupported(
            f"the tokenizer has a token {max(names)}, but the embedding has {num_rows} rows"
        )
    added = tokenizer.added_tokens_decoder
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise unsupported(
                f"the token {token.content!r} strips spaces or matches only complete words, which "
                "llama.cpp does not support"
            )
    return (
        [names.get(number, f"[PAD{number}]") for number in range(num_rows)],
        [_type(number, names, added) for number in range(num_rows)],
    )


def _type(number: int, names: Mapping[int, str], added: Mapping[int, Any]) -> TokenType:
    if number not in names:
        return TokenType.UNUSED
    if number not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED


def _special(tokenizer: Any, folder: Path, notes: list[str]) -> dict[str, int]:
    """Return role -> token id.

    Further tokens that end a generation get the roles `eot` and `eom`. Raises UsageError if there
    is no end-of-text token.
    """
    roles = ("bos", "eos", "unk", "pad")
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in roles}
    special = {role: number for role, number in ids.items() if number is not None}
    if "eos" not in special:
        raise unsupported("the tokenizer has no end-of-text token")
    others = [number for number in _end_tokens(folder) if number != special["eos"]]
    if len(others) > 2:
        notes.append(
            f"the tokens {others[2:]} also end a generation; a GGUF file has no entry for them"
        )
    return special | dict(zip(("eot", "eom"), others, strict=False))


def _end_tokens(folder: Path) -> list[int]:
    """Return the ids in `eos_token_id` of generation_config.json, if there is such a file."""
    settings = folder / "generation_config.json"
    if not settings.is_file():
        return []
    ids = json.loads(settings.read_text()).get("eos_token_id")
    return [number for number in (ids if isinstance(ids, list) else [ids]) if number is not None]


def _added(tokenizer: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Return whether the tokenizer adds bos and eos to a text, by tokenizing one."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    complete = tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            before = [special.get("bos")] if bos else []
            after = [special["eos"]] if eos else []
            if complete == [*before, *plain, *after]:
                return {"bos": bos, "eos": eos}
    raise unsupported("the tokenizer adds other tokens to a text than one bos and one eos")


def _template(tokenizer: Any, notes: list[str]) -> str | None:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template or None
    if len(template) > 1:
        notes.append("the GGUF file contains only the default one of the chat templates")
    default: str | None = template.get("default")
    return default
