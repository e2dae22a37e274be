"""compare_tools.py gives every tool the same rows, and its table is made from its figures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_tools
import pytest
from compare_tools import Bench, Cell
from tool_meter import Meter

from tests.helpers.runs import make_tokenizer

ROWS = [
    {"instruction": f"Say {word} twice.", "input": "", "output": f"{word} {word}"}
    for word in ("one", "two", "three")
]


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA: {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 8}))
    words = ["--out", str(tmp_path / "out.json"), "--model", str(tmp_path / "model")]
    words += ["--rows", str(rows), "--steps", "1", "--skip", "1", "--tools", "ours", "trainer"]
    return compare_tools._parser().parse_args(words)


def test_equal_rows_have_exactly_the_tokens_and_answers_only_their_labels(
    options: argparse.Namespace, tmp_path: Path
) -> None:
    bench = Bench(options, tmp_path)
    equal, defaults = Cell("equal", 4, 8, True), Cell("defaults", 4, 0, True)
    rows = [json.loads(line) for line in bench._rows(equal).read_text().splitlines()]
    assert [len(row["input_ids"]) for row in rows] == [8, 8]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert bench.trained_tokens(equal) == 16
    chats = [json.loads(line) for line in bench._rows(defaults).read_text().splitlines()]
    for row, chat in zip(ROWS, chats, strict=True):
        trained = [label for label in chat["labels"] if label >= 0]
        assert bench.tokenizer.decode(trained) == f"{row['output']}<|im_end|>\n"


def run(step: float, memory: int) -> dict[str, Any]:
    """Return the figures of one run with this time of a step."""
    clocks = {"clock_per_step": 2 * step, "processor_per_step": step, "clock": 9.0}
    return clocks | {"losses": [3.0, 1.0], "step_memory_bytes": memory, "steps": 2}


def test_ratios_are_taken_within_a_round_and_the_first_tool_changes(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options.rounds, bench, order = 2, Bench(options, tmp_path), list[str]()

    def fake(tool: str, cell: Cell) -> dict[str, Any]:
        order.append(tool)
        # The second round is ten times slower for both.
        slow = 10.0 if len(order) > 2 else 1.0
        return run(slow * (2.0 if tool == "ours" else 3.0), 4 if tool == "ours" else 10)

    monkeypatch.setattr(bench, "run", fake)
    row = compare_tools.compare(bench, Cell("equal", 4, 8, True), options)
    assert order == ["ours", "trainer", "trainer", "ours"]
    assert row["ratios"]["trainer"]["speed_by_processor"]["median"] == 1.5
    assert row["ratios"]["trainer"]["memory"]["median"] == 0.4
    assert "| equal, 4 bit, 8 tokens, blocks recomputed | trainer | 1.50x (1.50 to 1.50) |" in (
        compare_tools.table({"rows": [row]})
    )


def test_a_file_that_exists_is_continued(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = list[str]()

    def fake(bench: Bench, cell: Cell, _: argparse.Namespace) -> dict[str, Any]:
        ran.append(cell.name)
        return {"cell": cell.name, "ratios": {}}

    monkeypatch.setattr(compare_tools, "compare", fake)
    out = tmp_path / "tools.json"
    words = ["--model", str(options.model), "--rows", str(options.rows), "--out", str(out)]
    words += ["--scenarios", "equal", "--tokens", "8", "--checkpointing", "true", "--bits"]
    compare_tools.main([*words, "4"])
    compare_tools.main([*words, "4", "8"])
    assert ran == [f"equal, {bits} bit, 8 tokens, blocks recomputed" for bits in (4, 8)]
    rows = json.loads(out.read_text())["rows"]
    assert [row["command"].split()[-1] for row in rows] == ["4", "8"]


def test_ours_recomputes_as_few_blocks_as_the_memory_of_the_other_allows(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, cell = Bench(options, tmp_path), Cell("memory", 4, 8, True)

    def fake(tool: str, tried: Cell) -> dict[str, Any]:
        return run(1.0, 50 if tool == "trainer" else 100 - 10 * tried.checkpointing)

    monkeypatch.setattr(bench, "run", fake)
    assert compare_tools.own_cell(bench, cell, options).checkpointing == 6
    monkeypatch.setattr(bench, "run", lambda tool, _: run(1.0, 1 if tool == "trainer" else 2))
    assert compare_tools.own_cell(bench, cell, options) == cell, "every block"


def test_a_meter_leaves_out_the_first_steps() -> None:
    meter = Meter(on_gpu=False)
    meter.begin()
    meter.marks = [(0.0, 0.0), (8.0, 4.0), (9.0, 4.5), (12.0, 5.0)]
    found = meter.result(skip=1)
    assert (found["clock_per_step"], found["processor_per_step"]) == (2.0, 0.5)
    assert (found["clock"], found["processor"], found["steps"]) == (12.0, 5.0, 3)


_REUSED_HEAP = """
import ctypes
from tool_meter import Meter

heap = ctypes.CDLL(None)
heap.malloc.restype = ctypes.c_void_p
heap.free.argtypes = [ctypes.c_void_p]


def fill():
    places = [ctypes.c_void_p(heap.malloc(100_000)) for _ in range(400)]
    for place in places:
        ctypes.memset(place, 1, 100_000)
    return places


for place in fill()[:-1]:  # The heap cannot shrink below the last one.
    heap.free(place)
meter = Meter(on_gpu=False)
meter.begin()
fill()
meter.mark()
print(meter.result(skip=0)["step_memory_bytes"])
"""


def test_a_meter_counts_memory_that_loading_has_freed_and_steps_use_again(root: Path) -> None:
    """40 MB are freed before the first step, and as much is used again."""
    command = [sys.executable, "-c", _REUSED_HEAP]
    tools = {"PYTHONPATH": str(root / "tools" / "benchmarks")}
    done = subprocess.run(command, env=os.environ | tools, capture_output=True, check=True)
    assert 36e6 < int(done.stdout) < 60e6


def test_the_table_is_that_of_the_measurement(root: Path) -> None:
    report = json.loads((root / "tools" / "measurements" / "tools_cpu.json").read_text())
    page = (root / "docs" / "performance.md").read_text()
    inside = page.partition(compare_tools.BEGIN)[2].partition(compare_tools.END)[0]
    assert inside.strip() == compare_tools.table(report)
