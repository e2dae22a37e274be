"""Rows other than chats: at most one BOS, one trained EOS, only the completion is trained."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.formats import ALPACA, detect_format
from qlora_cli.data.row_store import Row
from qlora_cli.data.rows import read_rows
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, ModelError
from qlora_cli.nn.labels import IGNORE_INDEX
from tests.helpers.encoding import encode
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

TOKENIZERS = [
    "tokenizers/gpt2",
    "tokenizers/mistral_v3_hf",
    "models/stories260K",
    "models/books-gpt2",
]
pytestmark = needs_shared_data


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return load_tokenizer(str(SHARED_DATA / request.param))


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer(str(SHARED_DATA / "models" / "stories260K"))


def encoded(format, tokenizer, **fields):
    return encode([Row("rows.jsonl:1", fields)], format, tokenizer)[0]


def split(example):
    """Return the token ids that are not trained, and those that are."""
    pairs = list(zip(example.ids, example.labels, strict=True))
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)
    context = [token for token, label in pairs if label == IGNORE_INDEX]
    return context, [token for token, label in pairs if label != IGNORE_INDEX]


def test_all_tokens_of_text_are_trained_with_one_eos(tokenizer):
    example = encoded("text", tokenizer, text="A day, é 🙂.\n\nAnother day.")
    own = tokenizer("A day, é 🙂.\n\nAnother day.")["input_ids"]
    assert example.ids == [*own, tokenizer.eos_token_id]
    assert example.num_targets >= len(own) - 1
    assert example.labels[-1] == tokenizer.eos_token_id


def test_bos_and_eos_occur_once_if_the_text_contains_them(stories):
    example = encoded("text", stories, text="<s>A day.</s>")
    assert example.ids == encoded("text", stories, text="A day.").ids
    assert example.ids.count(stories.bos_token_id) == example.ids.count(stories.eos_token_id) == 1


def test_the_completion_is_trained_and_the_prompt_is_not(tokenizer):
    prompt, completion = "Once upon a time", " there was a 🙂 dog.\n"
    context, trained = split(encoded("completion", tokenizer, prompt=prompt, completion=completion))
    assert tokenizer.decode(context, skip_special_tokens=True).strip() == prompt
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trained[:-1]).strip() == completion.strip()


def test_prompt_and_completion_are_tokenized_as_one_text(tokenizer):
    example = encoded("completion", tokenizer, prompt="It is unbeliev", completion="able.")
    assert example.ids == [*tokenizer("It is unbelievable.")["input_ids"], tokenizer.eos_token_id]
    # Every token with a character of the completion is trained, also across the boundary.
    assert "able." in tokenizer.decode(split(example)[1])


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Co", "Cn")), max_size=30
)


@settings(deadline=None, max_examples=60)
@given(prompt=WORDS, completion=WORDS)
def test_every_character_of_the_completion_is_trained(prompt, completion):
    tokenizer = load_tokenizer_once("tokenizers/gpt2")
    example = encoded("completion", tokenizer, prompt=prompt, completion=completion + "!")
    trained = split(example)[1][:-1]
    text = tokenizer.decode(trained, skip_special_tokens=False)
    # A token across the boundary may contain the prompt's end; the completion is complete.
    assert text.endswith(completion + "!") or "\ufffd" in text
    assert sum(label != IGNORE_INDEX for label in example.labels) == len(trained) + 1


@cache
def load_tokenizer_once(name):
    return load_tokenizer(str(SHARED_DATA / name))


def test_alpaca_without_a_template_is_stanfords_prompt(tokenizer):
    fields = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    context, trained = split(encoded("alpaca", tokenizer, **fields))
    prompt = tokenizer.decode(context, skip_special_tokens=True)
    assert prompt.strip() == ALPACA.format(instruction="Name a colour.")
    assert tokenizer.decode(trained[:-1]).strip() == "Red."
    with_input = encoded("alpaca", tokenizer, instruction="Add.", input="2 + 2", output="4")
    assert "### Input:\n2 + 2\n\n### Response:" in tokenizer.decode(with_input.ids)


def test_alpaca_with_a_template_is_a_chat():
    qwen = load_tokenizer_once("tokenizers/qwen_hf")
    example = encoded("alpaca", qwen, instruction="Add.", input="2 + 2", output="4")
    expected = "<|im_start|>user\nAdd.\n\n2 + 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert qwen.decode(example.ids) == expected
    assert qwen.decode(split(example)[1]) == "4<|im_end|>"


def test_the_starters_rows_fit_its_tokenizer():
    tokenizer = load_tokenizer("starter")
    rows = read_rows("starter:held_out", limit=20)
    for row, example in zip(rows, encode(rows, "completion", tokenizer), strict=True):
        trained = split(example)[1]
        assert tokenizer.decode(trained[:-1]).strip() == row.fields["completion"].strip()
        assert trained[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "file",
    ["alpaca/alpaca_data_5k.jsonl", "mlx_lora_wikisql/valid.jsonl", "llamafactory/identity.json"],
)
def test_real_files(stories, file):
    rows = read_rows(str(SHARED_DATA / "instruct" / file), limit=300)
    examples = encode(rows, detect_format(rows, "auto"), stories)
    assert [example.origin for example in examples] == [row.origin for row in rows]
    for example in examples:
        assert example.ids.count(stories.bos_token_id) == 1
        assert example.labels[-1] == stories.eos_token_id


def test_a_row_without_a_trained_token_is_refused(stories):
    stories_without_eos = load_tokenizer(str(SHARED_DATA / "models" / "stories260K"))
    stories_without_eos.eos_token = None
    fields = {"prompt": "A day.", "completion": ""}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no token of this row would be trained"):
        encoded("completion", stories_without_eos, **fields)
    assert encoded("completion", stories, **fields).num_targets == 1


def test_without_an_end_token_none_is_added():
    tokenizer = load_tokenizer(str(SHARED_DATA / "models" / "stories260K"))
    tokenizer.eos_token = None
    assert encoded("text", tokenizer, text="A day.").ids == tokenizer("A day.")["input_ids"]


def test_rows_of_ids_need_no_tokenizer():
    plain = encoded("tokens", None, input_ids=[0, 1, 2])
    assert plain.labels == [0, 1, 2]
    masked = encoded("tokens", None, input_ids=[0, 1, 2], labels=[IGNORE_INDEX, 1, IGNORE_INDEX])
    assert (masked.labels, masked.num_targets) == ([IGNORE_INDEX, 1, IGNORE_INDEX], 1)
    with pytest.raises(ModelError, match="no tokenizer"):
        encoded("text", None, text="A day.")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"input_ids": [0, 1, 3]}, "ends at 2"),
        ({"input_ids": [0, -1]}, "is not a token id"),
        ({"input_ids": [0, 1], "labels": [0, -5]}, "is not a token id"),
        ({"input_ids": [0, 1], "labels": [0, IGNORE_INDEX]}, "no token of this row"),
        ({"input_ids": []}, "no token of this row"),
    ],
)
def test_ids_are_checked(fields, word):
    with pytest.raises(DataError, match=word):
        encode([Row("rows.jsonl:1", fields)], "tokens", None, vocab_size=3)
