"""Tokens and labels of fastokens equal those of the base's tokenizer; a difference is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_cli.data import encode, fast_tokens
from qlora_cli.data.encode import RenderedText, tokenized
from qlora_cli.data.fast_tokens import FastTokenizer, fast_tokenizer
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import QloraError
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data
from tests.helpers.vocabularies import (
    PRE_TOKENIZERS,
    TEXT,
    byte_level,
    byte_level_of,
    sentencepiece,
)

pytest.importorskip("fastokens", reason="needs the extra fast-tokens")

OWN = tuple(PRE_TOKENIZERS)
SHARED = ("gpt2", "qwen_hf")
_CHARACTERS = "aéΩﬁ٣🙂_ \t\u200d\u0301"
_WORDS = ["the day", "  ", " \n", "\r\n", "e\u0301", "日本", "<|im_end|>", "x.", "12345", "don't"]
PARTS = st.lists(
    st.one_of(
        st.sampled_from([*_CHARACTERS, *_WORDS]), st.text(st.characters(codec="utf-8"), max_size=4)
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(autouse=True, scope="module")
def no_text_is_needed_before() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_tokens, "_FEW_TEXTS", 0)
        yield


@pytest.fixture(scope="module", params=OWN)
def own_tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_level_of(request.param)


@pytest.fixture(scope="module", params=SHARED)
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(str(SHARED_DATA / "tokenizers" / request.param))


def _texts(parts: list[str]) -> Iterator[RenderedText]:
    """Yield texts of which every second part is trained, and a text that is trained completely."""
    text, spans = "", []
    for number, part in enumerate(parts):
        if number % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    for add_begin in (True, False):
        yield RenderedText(text, ((0, len(text)),), add_begin, add_end=True)
        if spans:
            yield RenderedText(text, tuple(spans), add_begin, add_end=not add_begin)


def _assert_equal(tokenizer: Any, parts: list[str]) -> None:
    texts = list(_texts(parts))
    origins = [f"row {number}" for number in range(len(texts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "fast_tokenizer", lambda *_: None)
        expected = tokenized(origins, texts, tokenizer)
    assert fast_tokenizer(tokenizer, 1) is not None
    assert tokenized(origins, texts, tokenizer) == expected


@settings(max_examples=150, deadline=None)
@given(PARTS)
def test_tokens_and_labels_are_those_of_the_tokenizer(own_tokenizer: Any, parts: list[str]) -> None:
    _assert_equal(own_tokenizer, parts)


@needs_shared_data
@settings(max_examples=150, deadline=None)
@given(PARTS)
def test_tokens_and_labels_of_real_tokenizers(real_tokenizer: Any, parts: list[str]) -> None:
    _assert_equal(real_tokenizer, parts)


@needs_shared_data
def test_real_texts_are_left_to_the_tokenizer_rarely(real_tokenizer: Any) -> None:
    lines = (SHARED_DATA / "instruct" / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]
    rows = [json.loads(line) for line in lines]
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    spans = [[(len(row["question"]), len(text))] for row, text in zip(rows, texts, strict=True)]
    fast = fast_tokenizer(real_tokenizer, 1)
    assert fast is not None
    found = fast.encode(texts, spans, add_special_tokens=False)
    assert sum(row is None for row in found) < 0.02 * len(found)
    for text, row in zip(texts, found, strict=True):
        assert row is None or row[0] == real_tokenizer(text)["input_ids"]


def test_other_tokenizers_are_not_replaced() -> None:
    with_prefix = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert fast_tokenizer(sentencepiece(), 1) is None
    assert fast_tokenizer(with_prefix, 1) is None


def _without(token: str, other: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in whose vocabulary one token is replaced by another."""
    definition = json.loads(byte_level_of("gpt-2").backend_tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    vocabulary[other] = vocabulary.pop(token)
    merges = [pair for pair in definition["model"]["merges"] if token not in "".join(pair)]
    definition["model"]["merges"] = merges
    inner = Tokenizer.from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize("other", ["a token with spaces", "Ġthing!"])
def test_a_vocabulary_without_every_byte_is_no_error(other: str) -> None:
    """Its tokens are not all bytes, or a byte of some texts has none."""
    tokenizer = _without("ð", other)  # The first byte of an emoji.
    text = "one \U0001f642"
    row = RenderedText(text, ((0, len(text)),), add_begin=False, add_end=False)
    (example,) = tokenized(["row"], [row], tokenizer)
    assert not isinstance(example, RowError)
    assert example.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def _faulty(tokenizer: Any, **changes: Any) -> FastTokenizer:
    """Return a FastTokenizer of a definition that differs from that of the tokenizer."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return FastTokenizer(tokenizer, definition | changes, len(tokenizer))


def test_other_tokens_in_the_first_text_are_an_error() -> None:
    tokenizer = byte_level_of("gpt-2")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    fast = _faulty(tokenizer, model=model | {"merges": model["merges"][:5]})
    text = TEXT[0]
    with pytest.raises(QloraError, match="different tokens") as caught:
        fast.encode([text], [[(0, len(text))]], add_special_tokens=False)
    assert "uninstall fastokens" in str(caught.value.hint)


def test_other_tokens_of_a_new_character_are_an_error() -> None:
    """Every character outside of ASCII is compared once, wherever it is."""
    tokenizer = byte_level_of("gpt-2")
    fast = _faulty(
        tokenizer, normalizer={"type": "Replace", "pattern": {"String": "é"}, "content": "e"}
    )
    texts = ["the thing", "naïve", "the thing", "café"]
    spans = [[(0, len(text))] for text in texts]
    assert None not in fast.encode(texts[:3], spans[:3], add_special_tokens=False)
    with pytest.raises(QloraError, match="different tokens"):
        fast.encode(texts, spans, add_special_tokens=False)


def test_a_definition_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_of("gpt-2")
    monkeypatch.setattr(FastTokenizer, "_expected", lambda self, text: [])
    assert fast_tokenizer(tokenizer, 1) is None


def test_few_texts_are_not_worth_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokens, "_FEW_TEXTS", 3)
    tokenizer = byte_level_of("gpt-2")
    assert [bool(fast_tokenizer(tokenizer, 2)) for _ in range(3)] == [False, False, True]
