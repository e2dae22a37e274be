"""A tokenizer with one token per byte, for models with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_vocabulary(special: Sequence[str]) -> list[str]:
    """Return the tokens in the order of their numbers: the special ones, then one per byte."""
    return [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]


def byte_tokenizer(special: Sequence[str], **roles: object) -> PreTrainedTokenizerFast:
    """Return the tokenizer of `byte_vocabulary`. roles: of special tokens, such as `bos_token`."""
    vocabulary = {token: number for number, token in enumerate(byte_vocabulary(special))}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
