"""Damaged and absurd data files: only our own errors come out, from the bytes to the findings."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.checks import examine
from qlora_cli.data.load import LoadedData, ModelLimits, RowLoader
from qlora_cli.data.rows import read_rows
from qlora_cli.data.text_checks import RowFaults
from qlora_cli.jobs.data_findings import dataset_of
from qlora_cli.recipe.schema import Data
from qlora_cli.tasks.registry import TASKS
from tests.helpers.checked_data import tokenizer
from tests.helpers.fuzz import (
    changed_json,
    changed_lines,
    damaged,
    fuzzed,
    only_own_errors,
    write,
)

pytestmark = pytest.mark.slow

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add one."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    {"role": "assistant", "content": "Two."},
]
ROWS: list[dict[str, Any]] = [
    {"text": "One line."},
    {"prompt": "One ", "completion": "line."},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"messages": CHAT, "tools": [TOOL]},
    {"messages": CHAT[:2], "functions": [TOOL["function"]]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2], "attention_mask": [1, 1, 1, 1]},
    {"prompt": "Two", "chosen": "is even", "rejected": "is odd"},
    {"prompt": CHAT[1:2], "chosen": CHAT[4:], "rejected": CHAT[4:]},
]
CSV = b'prompt,completion\n"a, b","c\n""d"""\ne,f\n'
TEXT = "First line.\r\nSecond line, with \u00e9.\n".encode()


def _parquet() -> bytes:
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS[:3]).encode()
JSON = json.dumps(ROWS[:3], indent=1).encode()
FILES = {
    "jsonl": damaged(JSONL),
    "json": st.one_of(damaged(JSON), changed_json(ROWS[:3])),
    "csv": damaged(CSV),
    "tsv": damaged(CSV.replace(b",", b"\t")),
    "txt": damaged(TEXT),
    "parquet": damaged(_parquet()),
    "jsonl.gz": damaged(gzip.compress(JSONL, mtime=0)),
}


@pytest.mark.parametrize("suffix", FILES)
def test_files(tmp_path_factory: pytest.TempPathFactory, suffix: str) -> None:
    file = tmp_path_factory.mktemp("file") / f"rows.{suffix}"

    @fuzzed()
    @given(FILES[suffix])
    def check(content: bytes) -> None:
        with only_own_errors():
            list(read_rows(str(write(file, content))))

    check()


def test_zstandard_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path_factory.mktemp("file") / "rows.jsonl.zst"

    @fuzzed()
    @given(damaged(zstandard.ZstdCompressor().compress(JSONL)))
    def check(content: bytes) -> None:
        with only_own_errors():
            list(read_rows(str(write(file, content))))

    check()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_rows(tmp_path_factory: pytest.TempPathFactory, task: str, chat: bool) -> None:
    """Rows are read, encoded and checked."""
    file, made = tmp_path_factory.mktemp("file") / "rows.jsonl", tokenizer(chat=chat)
    data = Data(train=str(file), seq_len=64)
    loader = RowLoader(data, made, ModelLimits(len(made)), TASKS[task].encode)

    @fuzzed(0.5)
    @given(changed_lines(*ROWS))
    def check(content: bytes) -> None:
        with only_own_errors():
            rows = loader.file(str(write(file, content)))
            loaded = LoadedData(rows, None, (), (), RowFaults())
            examine(dataset_of(data, loaded, made, file.parent))

    check()
