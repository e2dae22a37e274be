"""`qlora data` shows the tokens that are trained and refuses rows that cannot be used."""

import json

import pytest

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError
from qlora_cli.jobs.data import run
from qlora_cli.recipe.schema import Recipe
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data


def recipe(train, model="starter", **data):
    return Recipe.model_validate(
        {"model": {"name": str(model)}, "data": {"train": str(train), **data}}
    )


def test_the_starter():
    result = run(recipe("starter:train", eval="starter:held_out", seq_len=256), show=2)
    assert result.format == "completion"
    assert 0 < result.trained_tokens < result.tokens
    assert result.sequences < result.rows
    assert [row.origin for row in result.shown] == ["train.jsonl:1", "train.jsonl:2"]
    shown = result.shown[0].tokens
    trained_text = "".join(text for text, trained in shown if trained)
    assert trained_text.startswith(("The", "There", "You", "Open"))
    assert trained_text.endswith("<|im_end|>")
    assert [finding.code for finding in result.findings] == ["outside-template"]
    assert any("packing fills" in note for note in result.notes)
    json.dumps(result.to_dict())


@pytest.mark.slow
@needs_shared_data
@pytest.mark.parametrize(
    "name", ["tokenizers/gpt2", "models/stories260K", "tokenizers/mistral_v3_hf"]
)
def test_shown_tokens_are_the_text(tmp_path, name):
    text = "Once, é 🙂 upon  a\ntime, 東 or ★ ★. " * 5
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}))
    result = run(recipe(rows, SHARED_DATA / name, seq_len=512), show=1)
    tokenizer = load_tokenizer(str(SHARED_DATA / name))
    shown = "".join(piece for piece, _ in result.shown[0].tokens)
    shown = shown.removeprefix(tokenizer.bos_token).removesuffix(tokenizer.eos_token)
    assert shown.strip() == text.strip()
    assert result.trained_tokens == sum(trained for _, trained in result.shown[0].tokens)


@needs_shared_data
def test_rows_of_ids_without_a_tokenizer(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [2, 1, 0], "labels": [-100, 1, 0]}\n{"input_ids": [1, 1, 0]}')
    result = run(recipe(rows, SHARED_DATA / "models" / "gpt_nano_sort", seq_len=8), show=1)
    assert result.shown[0].tokens == (("2", False), ("1", True), ("0", True))
    assert (result.rows, result.tokens, result.trained_tokens) == (2, 6, 4)
    rows.write_text('{"input_ids": [2, 1, 3]}')
    with pytest.raises(DataError, match="the vocabulary ends at 2"):
        run(recipe(rows, SHARED_DATA / "models" / "gpt_nano_sort", seq_len=8), show=1)


def test_faulty_rows_fail(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        run(recipe(rows, seq_len=256), show=1)
