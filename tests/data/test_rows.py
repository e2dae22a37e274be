"""Rows are read with the place they come from, and all faults of a file are in one error."""

import errno

import pytest

from qlora_cli.data.formats import detect_format
from qlora_cli.data.rows import read_rows
from qlora_cli.errors import DataError, InputError
from tests.helpers.encoding import parse_rows
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

INSTRUCT = SHARED_DATA / "instruct"


def write_file(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@needs_shared_data
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
    assert len(parse_rows(found, format, has_chat_template=True)) == number


def test_the_starter_contains_rows():
    assert detect_format(read_rows("starter:train", limit=5), "auto") == "completion"
    assert read_rows("starter:held_out", limit=1)
    with pytest.raises(InputError, match="starter:other"):
        read_rows("starter:other")


def test_jsonl_with_bom_crlf_blank_lines_and_odd_separators(tmp_path):
    content = '\ufeff{"text": "a\u2028b"}\r\n\r\n  \n{"text": "ü 🙂"}'
    found = read_rows(write_file(tmp_path, "rows.jsonl", content))
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
        read_rows(write_file(tmp_path, "rows.jsonl", b"\n".join(lines)))
    messages = {problem.where: problem.what for problem in caught.value.problems}
    assert list(messages) == [f"rows.jsonl:{line}" for line in range(2, 7)]
    for line, word in ((2, "broken JSON"), (3, "a list"), (4, "twice"), (5, "UTF-8"), (6, "half")):
        assert word in messages[f"rows.jsonl:{line}"]


def test_a_json_list_keeps_the_lines_that_rows_begin_on(tmp_path):
    text = '[\n  {"text": "a"},\n\n  {\n "text": "b"\n  }, {"text": "c"}\n]\n'
    found = read_rows(write_file(tmp_path, "rows.json", text))
    assert [row.origin for row in found] == ["rows.json:2", "rows.json:4", "rows.json:6"]
    lines = read_rows(write_file(tmp_path, "lines.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert [row.origin for row in lines] == ["lines.json:1", "lines.json:2"]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text" "b"}]', '[{"text": "a"},\n3]'])
def test_a_broken_json_list_names_its_line(tmp_path, text):
    with pytest.raises(DataError, match=r"rows\.json:2: "):
        read_rows(write_file(tmp_path, "rows.json", text))


def test_all_rows_of_a_json_list_that_are_no_objects_are_named(tmp_path):
    with pytest.raises(DataError, match="2 of 3 rows"):
        read_rows(write_file(tmp_path, "rows.json", '[3,\n{"text": "a"},\n"b"]'))


@pytest.mark.parametrize("rest", ["", ' {"text": "b"}', ',,{"text": "b"}]', "] trailing"])
def test_a_json_list_that_ends_too_early_is_refused(tmp_path, rest):
    with pytest.raises(DataError, match="broken JSON"):
        read_rows(write_file(tmp_path, "rows.json", '[{"text": "a"}' + rest))


def test_csv_rows_are_numbered_by_their_first_line(tmp_path):
    text = '\ufeffprompt,completion\r\na,"two\r\nlines"\r\nb,c\r\n'
    found = read_rows(write_file(tmp_path, "rows.csv", text))
    assert [(row.origin, row.fields["completion"]) for row in found] == [
        ("rows.csv:2", "two\r\nlines"),
        ("rows.csv:4", "c"),
    ]
    assert read_rows(write_file(tmp_path, "rows.tsv", "text\n" + "x" * 200_000 + "\n"))


def test_csv_rows_with_missing_cells_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv:3.*number of cells"):
        read_rows(write_file(tmp_path, "rows.csv", "prompt,completion\na,b\nc\n"))


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
        read_rows(write_file(tmp_path, "broken.parquet", "PAR1 no"))


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


@pytest.mark.parametrize(
    ("fault", "is_offline", "hint"),
    [
        (ConnectionError("no route"), False, "hf auth login"),
        (ConnectionError("no route"), True, "HF_HUB_OFFLINE is set"),
        (OSError(errno.ENOSPC, "No space left on device"), False, "HF_HOME"),
    ],
)
def test_the_hint_of_a_hub_dataset_fits_the_error(fault, is_offline, hint, monkeypatch):
    import datasets
    import huggingface_hub

    def fail(name, split):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(InputError) as caught:
        read_rows("some/rows")
    assert hint in caught.value.hint
    assert fault.args[-1] in str(caught.value)


def test_errors_of_missing_and_unknown_files_list_similar_ones(tmp_path):
    write_file(tmp_path, "train.jsonl", "{}")
    with pytest.raises(InputError, match=r"train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without a data file"):
        read_rows(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no folder"):
        read_rows(str(tmp_path / "absent" / "rows.jsonl"))
    with pytest.raises(InputError, match="unknown file type"):
        read_rows(write_file(tmp_path, "rows.xlsx", "a"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_rows_is_an_error(tmp_path, name, text):
    with pytest.raises(DataError, match="no rows"):
        read_rows(write_file(tmp_path, name, text))
