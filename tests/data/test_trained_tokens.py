"""The tokens of spans: the lookup in the encoding equals the offsets of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.data.trained_tokens import _labels_by_offsets, trained_labels
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

TOKENIZERS = ["tokenizers/gpt2", "tokenizers/mistral_v3_hf", "models/stories260K"]
PIECES = st.sampled_from(
    ["a", "the day", " ", "  ", "\n", "é", "🙂", "日本", "</s>", "x.", "\t", "Ω"]
)
pytestmark = needs_shared_data


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return load_tokenizer(str(SHARED_DATA / request.param))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(PIECES, max_size=4).map("".join), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_lookup_equals_the_offsets(tokenizer, parts, add_special_tokens):
    """Every second part is trained."""
    text, spans = "", []
    for number, part in enumerate(parts):
        if number % 2 or len(parts) == 1:
            spans.append((len(text), len(text) + len(part)))
        text += part
    tokens = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    encoding, ids = tokens.encodings[0], tokens["input_ids"]
    expected = _labels_by_offsets(ids, tokens["offset_mapping"], spans)
    assert trained_labels(encoding, ids, spans, len(text)) == expected
