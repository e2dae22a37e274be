"""`qlora init`: the written recipe works at once, and its reasons are true."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qlora_cli.recipe.document import read_document
from qlora_cli.recipe.load import load_recipe
from qlora_cli.units import GIB, format_bytes
from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import Outcome, qlora

pytestmark = pytest.mark.slow


class Terminal(io.StringIO):
    """Answers of a person at a terminal."""

    def isatty(self) -> bool:
        return True


def in_terminal(answers: str, *arguments: str | Path) -> Outcome:
    with mock.patch.object(io, "StringIO", Terminal):
        return qlora(*arguments, stdin=answers)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which has the rows of each style."""
    monkeypatch.chdir(tmp_path)
    write("chats.jsonl", [chat(f"Say {word}.", f"{word}!") for word in words(40)])
    alpaca = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in words(40)]
    write("alpaca.jsonl", alpaca)
    pairs = [{"prompt": w, "chosen": f"{w}!", "rejected": "no", "id": w} for w in words(40)]
    write("pairs.jsonl", pairs)
    write("questions.jsonl", [{"question": w, "answer": w, "id": w} for w in words(40)])
    Path("book.txt").write_text("Once upon a time there was a little girl. " * 400)
    return tmp_path


def chat(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def words(number: int) -> list[str]:
    return [f"word {index}" for index in range(number)]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def reasons(outcome: Outcome) -> dict[str, tuple[Any, str]]:
    return {item["key"]: (item["value"], item["reason"]) for item in outcome.json["choices"]}


@pytest.mark.parametrize(
    "rows", ["chats.jsonl", "alpaca.jsonl", "book.txt", "questions.jsonl", "pairs.jsonl"]
)
def test_the_written_recipe_plans_and_trains(rows: str, folder: Path, shared: Path) -> None:
    base = shutil.copytree(shared / "data/models/stories260K", folder / "base")
    outcome = qlora("init", "mine.yaml", "--model", base, "--data", rows)
    assert outcome.code == 0, outcome.err
    assert "next: qlora train mine.yaml" in outcome.err
    content = read_document(Path("mine.yaml").read_text()).content
    assert {"bits", "seq_len", "micro_batch", "grad_accum", "lr"} <= {
        key for section in content.values() if isinstance(section, dict) for key in section
    }
    recipe = load_recipe("mine.yaml")
    assert recipe.output == "runs/mine"
    assert recipe.data.seq_len <= 512, "the base has 512 positions"
    assert (recipe.data.template == "chatml") == (rows == "chats.jsonl")
    assert (recipe.data.columns is not None) == (rows == "questions.jsonl")
    assert (recipe.task == "preference") == (rows == "pairs.jsonl")
    assert isinstance(recipe.data.eval, float)
    assert qlora("plan", "mine.yaml").code == 0
    outcome = qlora("train", "mine.yaml", "train.epochs=", "train.steps=2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 2


def test_the_figures_of_the_reasons_are_those_of_the_plan(folder: Path) -> None:
    words_ = ("init", "mine.yaml", "--model", "starter", "--data", "alpaca.jsonl")
    outcome = qlora(*words_, "--vram", "8GiB", "--eval", "0.25", "--json")
    assert outcome.code == 0, outcome.err
    result, chosen = outcome.json, reasons(outcome)
    planned = qlora("plan", "mine.yaml", "--vram", "8GiB", "--json").json
    assert result["needed_bytes"] == planned["ledger"]["allocator"]["reserved"]
    assert result["peak_bytes"] == planned["ledger"]["planned_peak_bytes"]
    assert format_bytes(result["needed_bytes"]) in chosen["train.micro_batch"][1]
    assert chosen["data.eval"][0] == 0.25
    assert result["rows"] == 30
    longest = qlora("data", "mine.yaml", "data.eval=", "train.eval_every=", "--json").json[
        "longest_row"
    ]
    seq_len, reason = chosen["data.seq_len"]
    assert longest <= seq_len < longest + 64
    assert reason == f"holds 40 of 40 rows; the longest has {longest} tokens"
    updates = qlora("data", "mine.yaml", "--json").json["updates"]
    assert result["updates"] == pytest.approx(updates, rel=0.1)
    assert updates >= 45, "below about 50 little is learned"


def test_a_large_model_gets_as_many_bits_as_fit(folder: Path, shared: Path) -> None:
    base = large_model(folder, shared)
    chosen = {}
    for vram in ("24GiB", "RTX 4060"):
        words_ = ("init", "mine.yaml", "--model", base, "--data", "alpaca.jsonl", "--force")
        outcome = qlora(*words_, "--vram", vram, "--eval", "none", "--json")
        assert outcome.code == 0, outcome.err
        chosen[vram] = reasons(outcome)
        assert outcome.json["needed_bytes"] <= 0.9 * outcome.json["usable_bytes"]
        assert "data.eval" not in chosen[vram]
        assert "train.eval_every" not in chosen[vram]
    assert chosen["24GiB"]["base.bits"][0] == 16
    bits, reason = chosen["RTX 4060"]["base.bits"]
    assert bits == 4
    assert float(re.findall(r"16 bit \(([\d.]+) GiB\)", reason)[0]) > 0.9 * 7.5 * GIB / GIB


def large_model(folder: Path, shared: Path) -> Path:
    """Return a folder with the config of Qwen3 8B and its tokenizer, without weights."""
    base = shutil.copytree(shared / "data/tokenizers/qwen_hf", folder / "large")
    shutil.copy(shared / "data/configs/Qwen3-8B.json", base / "config.json")
    return base


def test_a_model_that_is_too_large_is_put_into_host_memory(folder: Path, shared: Path) -> None:
    base = large_model(folder, shared)
    words_ = ("init", "mine.yaml", "--model", base, "--data", "alpaca.jsonl")
    outcome = qlora(*words_, "--vram", "4GiB", "--json")
    assert outcome.code == 0, outcome.err
    chosen = reasons(outcome)
    assert (chosen["base.residency"][0], chosen["base.bits"][0]) == ("host", 4)
    assert outcome.json["needed_bytes"] <= 0.9 * outcome.json["usable_bytes"]


def test_a_model_that_does_not_fit_at_all_exits_3_and_names_a_gpu(
    folder: Path, shared: Path
) -> None:
    base = large_model(folder, shared)
    words_ = ("init", "mine.yaml", "--model", base, "--data", "alpaca.jsonl")
    outcome = qlora(*words_, "--vram", "1GiB")
    assert_refused(outcome, 3, "does not fit", "a GPU with")
    assert not Path("mine.yaml").exists()


def test_an_existing_file_is_replaced_only_with_force(folder: Path) -> None:
    Path("mine.yaml").write_text("mine")
    words_ = ("init", "mine.yaml", "--model", "starter", "--data", "alpaca.jsonl")
    assert_refused(qlora(*words_), 2, "mine.yaml", "already exists", "--force")
    assert Path("mine.yaml").read_text() == "mine"
    assert qlora(*words_, "--force").code == 0
    assert load_recipe("mine.yaml").model.name == "starter"


def test_missing_options_are_named_without_a_terminal(folder: Path) -> None:
    assert_refused(qlora("init"), 2, "--model and --data are missing", "no terminal")
    assert_refused(qlora("init", "--model", "starter"), 2, "--data is missing")
    refused = qlora("init", "--model", "starter", "--data", "x.jsonl", "--eval", "1.5")
    assert refused.code == 2
    assert "1.5 is no share" in refused.err


def test_missing_options_are_asked_for_in_a_terminal(folder: Path) -> None:
    """A wrong answer is asked for again; an empty answer takes the default."""
    outcome = in_terminal("starter\nnope.jsonl\n\nRTX 9999\n8GiB\n", "init")
    assert outcome.code == 0, outcome.err
    assert "no file nope.jsonl" in outcome.err
    assert "neither a size nor a known GPU" in outcome.err
    assert load_recipe("recipe.yaml").data.train == "alpaca.jsonl", "the first file of rows"
    assert "next: qlora plan recipe.yaml --vram 8GiB" in outcome.err
