"""Rows come in with their places, and every fault of a file is told at once."""

import json
import os
from pathlib import Path

import pytest

from qlora_cli.data.formats import SHOWN_PROBLEMS, Row, detect_format, read_rows
from qlora_cli.data.messages import REQUIRED, conversation
from qlora_cli.errors import DataError, InputError

SHARED = Path(os.environ.get("QLORA_SHARED", Path(__file__).parents[3] / "shared"))
INSTRUCT = SHARED / "data" / "instruct"
needs_shared = pytest.mark.skipif(
    not INSTRUCT.is_dir(), reason="no shared data beside the checkout"
)


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows(*fields):
    return [Row(f"rows.jsonl:{number}", field) for number, field in enumerate(fields, 1)]


@needs_shared
@pytest.mark.parametrize(
    ("file", "number", "format"),
    [
        ("mlx_lora_wikisql/train.jsonl", 1000, "text"),
        ("alpaca/alpaca_data_5k.jsonl", 5000, "alpaca"),
        ("llamafactory/identity.json", 91, "alpaca"),
        ("llamafactory/glaive_toolcall_en_demo.json", 300, "sharegpt"),
        ("llamafactory/v1_sft_demo.jsonl", 500, "messages"),
        ("sharegpt_dummy/dummy_conversation.json", 500, "sharegpt"),
        ("openai_messages/toy_chat_fine_tuning.jsonl", 10, "messages"),
        ("openai_messages/weather_chat_fine_tuning.jsonl", 10, "messages"),
    ],
)
def test_real_files_are_read_and_recognized(file, number, format):
    found = read_rows(str(INSTRUCT / file))
    assert len(found) == number
    assert detect_format(found, "auto") == format


@needs_shared
def test_unknown_fields_are_refused_with_what_to_rename():
    found = read_rows(str(INSTRUCT / "gsm8k" / "test.jsonl"))
    with pytest.raises(DataError, match="question, answer") as caught:
        detect_format(found, "auto")
    assert "completion: prompt, completion" in str(caught.value)
    with pytest.raises(DataError, match="1,319 of 1,319 rows") as caught:
        detect_format(found, "completion")
    assert len(caught.value.problems) == SHOWN_PROBLEMS
    assert "rename 'question' to 'prompt'" in str(caught.value)


def test_the_starter_brings_its_rows():
    assert detect_format(read_rows("starter:train", limit=5), "auto") == "completion"
    assert read_rows("starter:held_out", limit=1)
    with pytest.raises(InputError, match="starter:other"):
        read_rows("starter:other")


def test_jsonl_with_bom_crlf_blank_lines_and_odd_separators(tmp_path):
    content = '\ufeff{"text": "a\u2028b"}\r\n\r\n  \n{"text": "ü 🙂"}'
    found = read_rows(written(tmp_path, "rows.jsonl", content))
    assert [(row.origin, row.fields["text"]) for row in found] == [
        ("rows.jsonl:1", "a\u2028b"),
        ("rows.jsonl:4", "ü 🙂"),
    ]


def test_every_broken_line_is_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "no end',
        b"[1]",
        b'{"text": "a", "text": "b"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud83d"}',
    ]
    with pytest.raises(DataError, match="5 of 6 rows") as caught:
        read_rows(written(tmp_path, "rows.jsonl", b"\n".join(lines)))
    said = {problem.where: problem.what for problem in caught.value.problems}
    assert list(said) == [f"rows.jsonl:{line}" for line in range(2, 7)]
    for line, word in ((2, "broken JSON"), (3, "a list"), (4, "twice"), (5, "UTF-8"), (6, "half")):
        assert word in said[f"rows.jsonl:{line}"]


def test_a_json_list_keeps_the_lines_that_rows_begin_on(tmp_path):
    text = '[\n  {"text": "a"},\n\n  {\n "text": "b"\n  }, {"text": "c"}\n]\n'
    found = read_rows(written(tmp_path, "rows.json", text))
    assert [row.origin for row in found] == ["rows.json:2", "rows.json:4", "rows.json:6"]
    lines = read_rows(written(tmp_path, "lines.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert [row.origin for row in lines] == ["lines.json:1", "lines.json:2"]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text" "b"}]', '[{"text": "a"},\n3]'])
def test_a_broken_json_list_names_its_line(tmp_path, text):
    with pytest.raises(DataError, match=r"rows\.json:2: "):
        read_rows(written(tmp_path, "rows.json", text))


def test_all_rows_of_a_json_list_that_are_no_objects_are_named(tmp_path):
    with pytest.raises(DataError, match="2 of 3 rows"):
        read_rows(written(tmp_path, "rows.json", '[3,\n{"text": "a"},\n"b"]'))


@pytest.mark.parametrize("rest", ["", ' {"text": "b"}', ',,{"text": "b"}]', "] trailing"])
def test_a_json_list_that_ends_too_early_is_refused(tmp_path, rest):
    with pytest.raises(DataError, match="broken JSON"):
        read_rows(written(tmp_path, "rows.json", '[{"text": "a"}' + rest))


def test_csv_rows_begin_where_their_first_line_stands(tmp_path):
    text = '\ufeffprompt,completion\r\na,"two\r\nlines"\r\nb,c\r\n'
    found = read_rows(written(tmp_path, "rows.csv", text))
    assert [(row.origin, row.fields["completion"]) for row in found] == [
        ("rows.csv:2", "two\r\nlines"),
        ("rows.csv:4", "c"),
    ]
    assert read_rows(written(tmp_path, "rows.tsv", "text\n" + "x" * 200_000 + "\n"))


def test_csv_rows_with_missing_cells_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv:3.*as many cells"):
        read_rows(written(tmp_path, "rows.csv", "prompt,completion\na,b\nc\n"))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 3
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), path)
    found = read_rows(str(path), limit=2)
    assert [row.origin for row in found] == ["rows.parquet:1", "rows.parquet:2"]
    assert detect_format(found, "auto") == "messages"
    with pytest.raises(InputError, match="Parquet"):
        read_rows(written(tmp_path, "broken.parquet", "PAR1 no"))


def test_hub_datasets(monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "some/absent":
            raise datasets.exceptions.DatasetNotFoundError("not on the hub")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.origin for row in read_rows("some/rows")] == ["some/rows:1", "some/rows:2"]
    assert read_rows("some/rows:test", limit=1)[0].origin == "some/rows:test:1"
    assert asked == [("some/rows", "train"), ("some/rows", "test")]
    with pytest.raises(InputError, match="not on the hub"):
        read_rows("some/absent")


def test_missing_and_unknown_files_say_what_is_there(tmp_path):
    written(tmp_path, "train.jsonl", "{}")
    with pytest.raises(InputError, match=r"train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        read_rows(str(tmp_path))
    with pytest.raises(InputError, match="no folder"):
        read_rows(str(tmp_path / "absent" / "rows.jsonl"))
    with pytest.raises(InputError, match="no known kind"):
        read_rows(written(tmp_path, "rows.txt", "a"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_rows_is_an_error(tmp_path, name, text):
    with pytest.raises(DataError, match="no rows"):
        read_rows(written(tmp_path, name, text))


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


def test_tool_calls_of_every_writing_become_one():
    arguments = {"city": "Rome"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    openai = {"function_call": {"name": "weather", "arguments": json.dumps(arguments)}}
    question = {"role": "user", "content": "?"}
    legacy = conversation({"messages": [question, {"role": "assistant", **openai}]}, "messages")
    assert legacy.messages[1] == {"role": "assistant", "tool_calls": [call]}
    value = json.dumps({"name": "weather", "arguments": arguments})
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
    sharegpt = conversation({"conversations": turns, "tools": "[]"}, "sharegpt")
    assert sharegpt.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert sharegpt.tools is None


def test_content_parts_and_weights():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    chat = [
        {"role": "user", "content": parts, "loss_weight": 0.0},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    found = conversation({"messages": chat}, "messages")
    assert [message["content"] for message in found.messages] == ["ab", "no", "yes"]
    assert found.trained == [False, False, True]
