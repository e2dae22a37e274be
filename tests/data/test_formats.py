"""Formats are detected by their fields, and rows of another format are named."""

import pytest

from qlora_cli.data.formats import FORMATS, detect_format, parse_rows
from qlora_cli.data.row_errors import SHOWN_PROBLEMS
from qlora_cli.data.rows import Row, read_rows
from qlora_cli.errors import DataError
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
        detect_format(found, "completion")
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
    }
    assert set(examples) == set(REQUIRED)
    for format, fields in examples.items():
        assert detect_format(rows(fields), "auto") == format
        assert detect_format(rows(fields), format) == format


FAULTS = [
    ("text", {"text": ""}, "empty"),
    ("text", {"text": 3}, "must be a text"),
    ("text", {"text": None}, "null"),
    ("text", {"txt": "a"}, "rename 'txt'"),
    ("completion", {"prompt": "a"}, "no field 'completion'"),
    ("completion", {"prompt": [], "completion": "b"}, "must be a text"),
    ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "'input'"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q", "a"]]}, "'history'"),
    ("tokens", {"input_ids": [1, "2"]}, "whole numbers"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2"),
    ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "padding"),
    ("sharegpt", {"conversations": []}, "not empty"),
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
        detect_format(rows(fields), format)
    assert word in str(caught.value)


def test_the_most_frequent_format_wins_and_the_others_are_faults():
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="1 of 3 rows") as caught:
        detect_format(rows(good, {"text": "a"}, good), "auto")
    assert [problem.where for problem in caught.value.problems] == ["rows.jsonl:2"]
