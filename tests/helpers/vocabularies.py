"""Small tokenizers with merges, of the kinds that llama.cpp supports, and models with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.runs import make_base

NUM_TOKENS = 420
"""Rows of the models' embeddings; a tokenizer may have fewer."""
TEXT = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  Two  spaces, a\ttab\n\n and new lines;\r\nI'LL see: äöü, 北京, 🦙🦙!",
    "the then there these they thing think third this thousand three 3.14 33 333",
] * 3
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits text into words by a pattern, then into bytes."""
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": split(_LLAMA3),
    "qwen2": split(_QWEN2),
}
"""llama.cpp's name of a pre-tokenizer -> the pre-tokenizer in the tokenizer.json of such models."""


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, *, whole_words: bool = False, **special: str
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on `TEXT`.

    whole_words: use a word that is in the vocabulary as it is, without applying merges. special:
    special tokens that differ, such as `bos_token`.
    """
    inner = Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=NUM_TOKENS - 20,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _finished(inner, **special)


def byte_level_of(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the pre-tokenizer that llama.cpp calls `name`."""
    return byte_level(PRE_TOKENIZERS[name], whole_words=name == "llama-bpe")


def sentencepiece(
    *, merges: list[tuple[str, str]] | None = None, prefix: str = "▁"
) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with byte fallback, like Llama 2's tokenizer.json.

    merges: replaces the merges that belong to the vocabulary. prefix: inserted before the text.
    """
    longer = ["th", "he", "▁t", "the", "▁the", "in", "ing", "▁thing"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzT.,'0123456789"]
    hexes = [f"<0x{number:02X}>" for number in range(256)]
    ids = {token: number for number, token in enumerate([*_SPECIAL, *hexes, *letters, *longer])}
    matching = [
        (token[:cut], token[cut:])
        for token in longer
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    used = matching if merges is None else merges
    inner = Tokenizer(models.BPE(ids, used, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend(prefix), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(inner, unk_token="<unk>")


def _finished(inner: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    # The trainer only reserves these words. This call makes them special tokens.
    inner.add_special_tokens(_SPECIAL)
    roles = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    return tokenizer


def make_model_with_tokenizer(
    folder: Path, family: str, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> Path:
    """Write a model like `make_base`, but with a tokenizer that has merges (default: gpt-2's)."""
    base = make_base(folder, family, **settings)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(11)
    model.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table.copy_(0.3 * torch.randn(table.shape))
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    (tokenizer or byte_level_of("gpt-2")).save_pretrained(base)
    return base
