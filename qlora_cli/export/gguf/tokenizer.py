"""A model's tokenizer as llama.cpp reads it from a GGUF file, or a refusal.

llama.cpp splits texts by its own code, so a tokenizer can be carried only where that code does what
this one does. There are two kinds:

- `gpt2`: byte-level BPE with its merges. How a text is cut into words first is a name that
  llama.cpp knows (`tokenizer.ggml.pre`); its own converter tells the name by a hash over the ids
  of a test text, here it is told by the definition, which also holds for an extended vocabulary.
- `llama`: SentencePiece's BPE, in tokenizer.json a BPE with byte fallback. It has no merges but a
  score a token, and any two neighbours are merged that make a token. The scores are taken from the
  merges' order, where those say the same: one uninterrupted run of ranks a token, and no pair left
  out.

Anything else is refused: a model with another tokenizer answers, and answers wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import UsageError

_WORDS, _DIGITS = "words", "digits"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NAMES: Mapping[tuple[str, ...], tuple[str, bool]] = {
    (_WORDS,): ("gpt-2", False),
    (_DIGITS, _WORDS): ("smollm", False),
    (rf"{_CLITICS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): ("llama-bpe", True),
    (rf"{_CLITICS}|{_LETTERS}|\p{{N}}|{_REST}",): ("qwen2", False),
}
"""How words are cut -> (llama.cpp's name for it, whether whole words skip the merges there)."""
_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. kind: `gpt2` or `llama`.

    tokens, types: one a row of the embedding. scores: of `llama`. merges: of `gpt2`. special:
    role -> id. adds: role -> whether it is put around a text. notes: what llama.cpp does otherwise.
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
        """Adds the metadata."""
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
        for role, added in self.adds.items():
            getattr(writer, f"add_add_{role}_token")(added)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, num_rows: int) -> Vocabulary:
    """The tokenizer of a model's folder. num_rows: of its embedding.

    Raises UsageError where llama.cpp would not split texts as it does, ModelError where it is
    damaged.
    """
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None:
        raise unsupported("the model has no tokenizer")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in odd):
        raise unsupported(f"its tokenizer is a {model['type']} of another kind than llama.cpp has")
    tokens, types = _tokens(tokenizer, num_rows)
    notes: list[str] = []
    special = _special(tokenizer, folder, notes)
    told: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "adds": _added(tokenizer, special),
        "template": _template(tokenizer, notes),
        "notes": notes,
    }
    if model.get("byte_fallback"):
        return _sentencepiece(definition, told)
    return _byte_level(definition, told)


def unsupported(why: str) -> UsageError:
    """The model cannot be written as GGUF."""
    return UsageError(
        why,
        where="--gguf",
        hint="leave --gguf out; llama.cpp's convert_hf_to_gguf.py may know this model",
    )


def _byte_level(definition: Mapping[str, Any], told: dict[str, Any]) -> Vocabulary:
    model = definition["model"]
    if not set(model["vocab"]) >= _BYTES or not model["merges"]:
        raise unsupported("its tokenizer has not a token for every byte, or no merges")
    normalizer = definition["normalizer"]
    if normalizer is not None:
        if normalizer != {"type": "NFC"}:
            raise unsupported(
                f"its tokenizer's normalizer {normalizer['type']} is none of llama.cpp's"
            )
        told["notes"].append("llama.cpp does not compose accents (NFC) before it splits a text")
    name, whole_words = _NAMES.get(_cuts(definition["pre_tokenizer"]), (None, False))
    if name is None or whole_words != bool(model.get("ignore_merges")):
        raise unsupported("its tokenizer cuts words in a way that has no known name in llama.cpp")
    merges = [" ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", name, merges=merges, **told)


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a byte-level pre-tokenizer; raises UsageError for one that is none."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise unsupported("its tokenizer is neither byte-level nor has it byte fallback")
    cuts = [_cut(step) for step in steps[:-1]]
    return (*cuts, _WORDS) if last.get("use_regex", True) else tuple(cuts)


def _cut(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGITS
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return str(step["pattern"].get("Regex"))
    return str(step["type"])


def _sentencepiece(definition: Mapping[str, Any], told: dict[str, Any]) -> Vocabulary:
    types, ids = told["types"], definition["model"]["vocab"]
    hexes = {f"<0x{number:02X}>" for number in range(256)}
    if not ids.keys() >= hexes:
        raise unsupported("its tokenizer has not a token for every byte")
    for token in hexes:
        types[ids[token]] = TokenType.BYTE
    unknown = told["special"].get("unk")
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    normal = {token for token, number in ids.items() if types[number] == TokenType.NORMAL}
    ranks = _ranks(normal, [tuple(pair) for pair in definition["model"]["merges"]])
    # Of a token that no merge makes, the score is never asked for.
    scores = [-float(ranks.get(token, 0)) for token in told["tokens"]]
    prefix = _space_prefix(definition, told["notes"])
    return Vocabulary("llama", "default", scores=scores, space_prefix=prefix, **told)


def _ranks(tokens: set[str], merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Each merged token's place in the order of merging; raises UsageError where it has none."""
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    known = set(merges)
    complete = all(pair in known for token in tokens for pair in _halves(token, tokens))
    if not complete or any(own[-1] - own[0] >= len(own) for own in ranks.values()):
        raise unsupported(
            "its tokenizer's merges are not the order of its tokens, as SentencePiece's"
        )
    return {token: own[0] for token, own in ranks.items()}


def _halves(token: str, tokens: set[str]) -> Iterator[tuple[str, str]]:
    """The pairs that llama.cpp would merge to the token: of tokens, or of single characters."""
    for cut in range(1, len(token)):
        pair = token[:cut], token[cut:]
        if all(len(half) == 1 or half in tokens for half in pair):
            yield pair


def _space_prefix(definition: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a text begins with a space that it has not; raises UsageError for other changes."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizer, cut = definition["normalizer"], definition["pre_tokenizer"]
    if cut is None:
        if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
            return True
        if normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
            return False
    elif normalizer is None and cut["type"] == "Metaspace":
        scheme, split = cut.get("prepend_scheme"), cut.get("split", True)
        if cut["replacement"] == _SPACE and not split:
            if scheme == "first":
                notes.append(
                    "llama.cpp puts a space behind every special token within a text; this "
                    "tokenizer puts one at a text's beginning only"
                )
            return bool(scheme != "never")
    raise unsupported("its tokenizer changes texts in a way that llama.cpp does not")


def _tokens(tokenizer: Any, num_rows: int) -> tuple[list[str], list[TokenType]]:
    """(text, type) of every row of the embedding; rows without a token are marked unused."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= num_rows:
        raise unsupported(f"its tokenizer has token {max(names)}, the embedding {num_rows} rows")
    added = tokenizer.added_tokens_decoder
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise unsupported(f"its token {token.content!r} takes spaces or whole words with it")
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
    """Role -> id, with the other tokens that end an answer as `eot` and `eom`."""
    roles = ("bos", "eos", "unk", "pad")
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in roles}
    special = {role: number for role, number in found.items() if number is not None}
    if "eos" not in special:
        raise unsupported("its tokenizer has no end-of-text token")
    settings = folder / "generation_config.json"
    told = json.loads(settings.read_text()).get("eos_token_id") if settings.is_file() else None
    ends = [number for number in (told if isinstance(told, list) else [told]) if number is not None]
    others = [number for number in ends if number != special["eos"]]
    if len(others) > 2:
        notes.append(f"tokens {others[2:]} end an answer too; a GGUF file has no place for that")
    return special | dict(zip(("eot", "eom"), others, strict=False))


def _added(tokenizer: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Which of bos and eos stand around a text, asked of the tokenizer itself."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            before = [special.get("bos")] if bos else []
            after = [special["eos"]] if eos else []
            if whole == [*before, *plain, *after]:
                return {"bos": bos, "eos": eos}
    raise unsupported("its tokenizer puts other tokens around a text than one bos and one eos")


def _template(tokenizer: Any, notes: list[str]) -> str | None:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template or None
    if len(template) > 1:
        notes.append("of its chat templates only the default one is in the GGUF file")
    default: str | None = template.get("default")
    return default
