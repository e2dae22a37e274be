"""Formats are detected by their fields, and rows of another format are named."""

import json
import re
from typing import get_args

import pytest

from qlora_cli.data.formats import (
    FORMATS,
    PromptCompletion,
    RowFormat,
    detect_format,
)
from qlora_cli.data.row_errors import SHOWN_PROBLEMS
from qlora_cli.data.row_store import Row
from qlora_cli.data.rows import read_rows
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError
from qlora_cli.recipe.describe import settings
from qlora_cli.recipe.schema import DataFormat
from tests.helpers.encoding import encode, parse_rows
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

INSTRUCT = SHARED_DATA / "instruct"


def rows(*fields):
    return [Row(f"rows.jsonl:{number}", field) for number, field in enumerate(fields, 1)]


@needs_shared_data
def test_unknown_fields_are_refused_with_what_to_rename():
    found = read_rows(str(INSTRUCT / "gsm8k" / "test.jsonl"))
    with pytest.raises(DataError, match="question, answer") as caught:
        detect_format(found, "auto")
    assert "completion: prompt, completion" in str(caught.value)
    with pytest.raises(DataError, match="1,319 of 1,319 rows") as caught:
        parse_rows(found, detect_format(found, "completion"))
    assert len(caught.value.problems) == SHOWN_PROBLEMS
    assert "rename 'question' to 'prompt'" in str(caught.value)


def test_every_format_is_known_by_its_fields():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    examples = {
        "text": {"text": "a"},
        "completion": {"prompt": "a", "completion": "b"},
        "alpaca": {"instruction": "a", "input": "", "output": "b", "text": "a b"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        },
        "messages": {"messages": chat},
        "tokens": {"input_ids": [1, 2]},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "classification": {"text": "a", "label": "b"},
    }
    assert set(examples) == set(FORMATS)
    assert detect_format(rows(examples["classification"]), "classification") == "classification"
    # The task sets the format: labelled texts can be trained as texts, too.
    del examples["classification"]
    for format, fields in examples.items():
        assert detect_format(rows(fields), "auto") == format
        assert detect_format(rows(fields), format) == format
        if format == "preference":
            continue  # Its rows are encoded by another function, tested in test_pairs.py.
        assert len(parse_rows(rows(fields), format)) == 1


FAULTS = [
    ("text", {"text": ""}, "empty"),
    ("text", {"text": 3}, "must be a string"),
    ("text", {"text": None}, "null"),
    ("text", {"txt": "a"}, "rename 'txt'"),
    ("completion", {"prompt": "a"}, "no field 'completion'"),
    ("completion", {"prompt": [], "completion": "b"}, "must be a string"),
    ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "'input'"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q", "a"]]}, "'history'"),
    ("tokens", {"input_ids": [1, "2"]}, "list of integers"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2"),
    ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "padding"),
    ("sharegpt", {"conversations": []}, "non-empty"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "'alien'"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no assistant"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "broken JSON"),
    ("messages", {"messages": "a"}, "list of messages"),
    ("messages", {"messages": ["a"]}, "message 1"),
    ("messages", {"messages": [{"role": "assistant"}]}, "no content"),
    ("messages", {"messages": [{"content": "a"}]}, "no field 'role'"),
    ("messages", {"messages": [{"role": "assistant", "content": {"a": 1}}]}, "list of text parts"),
    ("messages", {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "'image'"),
    ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight"),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
        "no assistant",
    ),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "function's name"),
]


@pytest.mark.parametrize(("format", "fields", "word"), FAULTS)
def test_faulty_rows_are_named(format, fields, word):
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as caught:
        parse_rows(rows(fields), detect_format(rows(fields), format))
    assert word in str(caught.value)


def test_the_most_frequent_format_wins_and_the_others_are_faults():
    good = {"prompt": "a", "completion": "b"}
    read = rows(good, {"text": "a"}, good)
    with pytest.raises(DataError, match="1 of 3 rows") as caught:
        parse_rows(read, detect_format(read, "auto"))
    assert [problem.where for problem in caught.value.problems] == ["rows.jsonl:2"]


def test_alpaca_rows_with_fields_of_a_chat_need_a_chat_template():
    fields = {"instruction": "a", "output": "b", "system": "s"}
    assert parse_rows(rows(fields), "alpaca", has_chat_template=True)
    with pytest.raises(DataError, match="'system' needs a chat template"):
        parse_rows(rows(fields), "alpaca")


def test_the_schema_lists_the_registered_formats():
    assert set(get_args(DataFormat)) == set(FORMATS)
    assert all(known.name == name for name, known in FORMATS.items())
    meaning = next(setting.meaning for setting in settings() if setting.key == "data.format")
    for name, known in FORMATS.items():
        assert f"{name}: {known.fields_text}" in meaning


def test_the_documentation_lists_the_registered_formats(root):
    table = (root / "docs" / "data.md").read_text().partition("## Formats")[2].split("\n\n## ")[0]
    lines = re.findall(r"^\| `(\w+)` \|(.*)$", table, re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(FORMATS)
    for name, line in lines:
        known = FORMATS[name]
        assert all(f"`{field}`" in line for field in (*known.required, *known.optional)), name


def test_a_new_format_is_one_entry(monkeypatch):
    def convert(fields, has_chat_template):
        return PromptCompletion(fields["q"], fields["a"])

    toy = RowFormat("toy", "A toy.", required=("q", "a"), convert=convert)
    monkeypatch.setitem(FORMATS, "toy", toy)
    row = Row("rows.jsonl:1", {"q": "A", "a": " day."})
    assert detect_format([row], "auto") == "toy"
    example = encode([row], "toy", load_tokenizer("starter"))[0]
    assert 0 < example.num_targets < len(example.ids)


@pytest.mark.parametrize(
    ("format", "fields"),
    [
        ("messages", {"messages": '[{"role": "user", "content": "q"}, '
                                  '{"role": "assistant", "content": "a"}]', "tools": ""}),
        ("tokens", {"input_ids": "[1, 2, 3]", "labels": "[-100, 2, 3]", "attention_mask": ""}),
    ],
)  # fmt: skip
def test_json_text_in_a_cell_is_decoded(format, fields):
    decoded = {key: json.loads(value) if value else None for key, value in fields.items()}
    rows = [Row("rows.csv:2", fields), Row("rows.csv:3", decoded)]
    first, second = parse_rows(rows, format, has_chat_template=True)
    assert first == second


def test_python_text_in_a_cell_is_refused_with_a_hint():
    row = Row("rows.csv:2", {"messages": "[{'role': 'user', 'content': 'q'}]"})
    with pytest.raises(DataError, match=r"json\.dumps"):
        parse_rows([row], "messages", has_chat_template=True)


def test_fields_with_names_of_other_tools_get_the_columns_to_set():
    row = Row("rows.jsonl:1", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"data\.columns to {prompt: question, completion: answer}"):
        detect_format([row], "auto")
