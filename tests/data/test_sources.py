"""Rows come from files of several types, compressed files, folders, patterns and lists."""

import gzip
import json

import pytest

from qlora_cli.data import compression
from qlora_cli.data.readers import READERS, file_type
from qlora_cli.data.rows import read_places, read_rows
from qlora_cli.errors import DataError, InputError


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(where):
    return [row.fields["text"] for row in read_rows(str(where))]


@pytest.mark.parametrize("name", ["novel.txt", "novel.md", "NOVEL.TXT"])
def test_a_text_file_is_one_row(tmp_path, name):
    where = write_file(tmp_path / name, "\ufeffOne.\r\n\r\nTwo é.\n")
    (row,) = read_rows(where)
    assert (row.origin, row.fields) == (f"{name}:1", {"text": "One.\n\nTwo é.\n"})


def test_a_text_file_that_is_not_utf8_names_its_line(tmp_path):
    with pytest.raises(DataError, match=r"novel\.txt:2: not UTF-8"):
        read_rows(write_file(tmp_path / "novel.txt", b"a\n\xff\n"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("compressed", [".gz", ".zst"])
def test_a_compressed_file_has_the_rows_of_the_file(tmp_path, suffix, compressed):
    zstandard = pytest.importorskip("zstandard")
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[compressed]
    content = {".csv": "text\nA day.\n", ".tsv": "text\nA day.\n", ".txt": "A day."}
    plain = content.get(suffix, json.dumps({"text": "A day."}))
    where = write_file(tmp_path / f"rows{suffix}{compressed}", compress(plain.encode()))
    (row,) = read_rows(where)
    assert row.fields == {"text": "A day."}
    assert row.origin.startswith(f"rows{suffix}{compressed}:")


@pytest.mark.parametrize("compressed", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"no", b""])
def test_damaged_compressed_data_is_refused(tmp_path, compressed, content):
    zstandard = pytest.importorskip("zstandard")
    if not content:  # The end is missing.
        compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[compressed]
        content = compress(json.dumps({"text": "A day. " * 50}).encode())[:-9]
    with pytest.raises(InputError, match=r"damaged|broken JSON"):
        read_rows(write_file(tmp_path / f"rows.jsonl{compressed}", content))


def test_zst_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"qlora-cli\[zstd\]"):
        read_rows(write_file(tmp_path / "rows.jsonl.zst", b""))


def test_compressed_parquet_is_no_known_type(tmp_path):
    assert file_type(tmp_path / "rows.parquet.gz") is None
    assert {file_type(tmp_path / f"rows{suffix}") for suffix in READERS} == set(READERS)


def test_a_folder_is_its_readable_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "image.png", ".hidden.jsonl"):
        write_file(tmp_path / name, json.dumps({"text": name}))
    write_file(tmp_path / "README.md", "About the rows.")
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl"]


def test_a_folder_of_texts_is_one_row_per_file(tmp_path):
    for name in ("two.txt", "one.md"):
        write_file(tmp_path / name, name)
    assert texts(tmp_path) == ["one.md", "two.txt"]


def test_a_pattern_is_its_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_file(tmp_path / name, json.dumps({"text": name}))
    assert texts(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(tmp_path / "**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    with pytest.raises(InputError, match="no file matches"):
        read_rows(str(tmp_path / "*.csv"))


def test_rows_of_files_with_equal_names_have_different_origins(tmp_path):
    places = [write_file(tmp_path / name / "r.jsonl", '{"text": "a"}') for name in "ab"]
    origins = [row.origin for rows in read_places(places) for row in rows]
    assert origins == [f"{place}:1" for place in places]


def test_the_faults_of_all_files_are_in_one_error(tmp_path):
    places = [write_file(tmp_path / f"{name}.jsonl", "{}\n{") for name in "ab"]
    with pytest.raises(DataError, match="2 of 4 rows") as caught:
        read_places(places)
    assert [problem.where for problem in caught.value.problems] == ["a.jsonl:2", "b.jsonl:2"]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text": "b"}]', '\ufeff [\n {"text": "a"}]'])
def test_a_json_list_in_a_jsonl_file_is_read(tmp_path, text):
    assert texts(write_file(tmp_path / "rows.jsonl", text))[0] == "a"


def test_a_csv_file_with_semicolons_is_read(tmp_path):
    where = write_file(tmp_path / "rows.csv", 'prompt;completion\r\n"a;b";c, d\r\n')
    (row,) = read_rows(where)
    assert row.fields == {"prompt": "a;b", "completion": "c, d"}


def test_columns_are_renamed_to_fields(tmp_path):
    rows = [{"question": "q", "answer": "a", "id": 3}, {"prompt": "p", "completion": "c"}]
    where = write_file(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    columns = {"prompt": "question", "completion": "answer"}
    assert [row.fields for row in read_rows(where, columns=columns)] == [
        {"id": 3, "prompt": "q", "completion": "a"},
        {"prompt": "p", "completion": "c"},
    ]
    with pytest.raises(DataError, match="no column 'ask'"):
        read_rows(where, columns={"completion": "ask"})


def test_columns_apply_to_the_files_of_a_mixture_that_have_them(tmp_path):
    first = write_file(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}')
    second = write_file(tmp_path / "b.jsonl", '{"instruction": "i", "output": "o"}')
    columns = {"prompt": "question", "completion": "answer"}
    rows = [row.fields for rows in read_places([first, second], columns=columns) for row in rows]
    assert rows == [{"prompt": "q", "completion": "a"}, {"instruction": "i", "output": "o"}]
    half = write_file(tmp_path / "c.jsonl", '{"question": "q"}')
    with pytest.raises(DataError, match="no column 'answer'"):
        read_places([first, half], columns=columns)
