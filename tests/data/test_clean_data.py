"""Real rows and real chat templates have no findings, apart from faults that they really have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import Data
from tests.helpers.checked_data import findings_of, write_rows
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

pytestmark = needs_shared_data
Row = dict[str, Any]

INSTRUCT = SHARED_DATA / "instruct"
TOKENIZERS = SHARED_DATA / "tokenizers"
GPT2, QWEN, MISTRAL = TOKENIZERS / "gpt2", TOKENIZERS / "qwen_hf", TOKENIZERS / "mistral_v3_hf"
ROWS = 600
"""Rows of a set; some are real data of several thousand rows."""
NOVELS = sorted((SHARED_DATA / "text" / "novels").glob("*_*.txt"))[::4]
TEXTS = [
    *NOVELS,
    SHARED_DATA / "text" / "tinyshakespeare" / "input.txt",
    SHARED_DATA / "text" / "wikitext2" / "valid.txt",
]


def json_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()[:ROWS]]


def chats(pairs: Iterator[tuple[str, str]]) -> list[Row]:
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]


def gsm8k() -> Iterator[tuple[str, str]]:
    rows = json_lines(INSTRUCT / "gsm8k" / "test.jsonl")
    return ((row["question"], row["answer"]) for row in rows)


def lines_of(*parts: str) -> list[str]:
    path = SHARED_DATA.joinpath(*parts)
    return list(dict.fromkeys(path.read_text().splitlines()[1:]))[:ROWS]


def e2e() -> list[Row]:
    """Several references per meaning, which is no contradiction."""
    parts = (line.split("||") for line in lines_of("nlg", "e2e", "train.txt"))
    return [{"prompt": f"{meaning}\n", "completion": text.strip()} for meaning, text in parts]


def sentiment() -> list[Row]:
    parts = (line.rsplit("\t", 1) for line in lines_of("glue", "sst2_sentences", "dev.tsv"))
    names = ("negative", "positive")
    return [{"prompt": f"{text}\n", "completion": names[int(label)]} for text, label in parts]


def entailment() -> list[Row]:
    parts = (line.split("\t") for line in lines_of("glue", "RTE", "train.tsv"))
    return [{"prompt": f"{a}\n{b}\n", "completion": label} for _, a, b, label in parts]


def alpaca() -> list[Row]:
    return [
        row for row in json_lines(INSTRUCT / "alpaca" / "alpaca_data_5k.jsonl") if row["output"]
    ]


def identity() -> list[Row]:
    rows: list[Row] = json.loads((INSTRUCT / "llamafactory" / "identity.json").read_text())
    return rows


def share_gpt() -> list[Row]:
    path = INSTRUCT / "sharegpt_dummy" / "dummy_conversation.json"
    rows: list[Row] = json.loads(path.read_text())
    return rows


def without_repeats(rows: list[Row]) -> list[Row]:
    return list({json.dumps(row): row for row in rows}.values())


def demo() -> list[Row]:
    return without_repeats(json_lines(INSTRUCT / "llamafactory" / "v1_sft_demo.jsonl"))


def starter() -> list[Row]:
    from qlora_cli.starter import __file__ as package

    return json_lines(Path(package).with_name("train.jsonl"))


SETS: dict[str, tuple[Path, Callable[[], list[Row]]]] = {
    "gsm8k as chats": (QWEN, lambda: chats(gsm8k())),
    "gsm8k as alpaca": (GPT2, lambda: [{"instruction": q, "output": a} for q, a in gsm8k()]),
    "e2e": (GPT2, e2e),
    "sentiment": (GPT2, sentiment),
    "entailment": (GPT2, entailment),
    "alpaca": (QWEN, alpaca),
    "alpaca without template": (GPT2, alpaca),
    "identity": (QWEN, identity),
    "share_gpt": (QWEN, share_gpt),
    "demo": (QWEN, demo),
    "starter": (GPT2, starter),
    "wikisql": (GPT2, lambda: json_lines(INSTRUCT / "mlx_lora_wikisql" / "valid.jsonl")),
}
REAL_FAULTS = {
    # A zero-width space in one question, a byte of Windows-1252 in one sentence, a repeated pair.
    "gsm8k as chats": {"invisible-characters"},
    "gsm8k as alpaca": {"invisible-characters"},
    "entailment": {"control-characters", "duplicates"},
    # Two questions that differ in one word have the same long answer.
    "share_gpt": {"similar-rows"},
}
TEMPLATES = sorted((SHARED_DATA / "chat_templates").glob("*/*.jinja"))
REFUSE_PLAIN_CHATS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}
"""Templates that need tools."""
OF_TEMPLATES = {"no-end", "dated-template"}
"""Findings about templates that write today's date, or end turns with plain text."""


@cache
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def found(train: Path, made: Any, **settings: Any) -> dict[str, str]:
    """Return the code and the text of each finding."""
    data = Data.model_validate({"train": str(train), "seq_len": 4096, **settings})
    return {one.code: one.text for one in findings_of(data, made)}


@pytest.mark.parametrize("name", SETS)
def test_real_rows_are_sound(tmp_path: Path, name: str) -> None:
    folder, read = SETS[name]
    rows = write_rows(tmp_path / "rows.jsonl", read())
    findings = found(rows, tokenizer(folder))
    assert findings.keys() == REAL_FAULTS.get(name, set()), findings


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_real_texts_are_sound(path: Path) -> None:
    assert not found(path, tokenizer(GPT2), eval=0.1)


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_sound_chats_are_sound_in_every_real_template(tmp_path: Path, path: Path) -> None:
    made = tokenizer(MISTRAL)
    made.chat_template = path.read_text()
    pairs = [(f"What is {n} + 2?", f"It is {n + 2}, of course.") for n in range(30)]
    rows = write_rows(tmp_path / "rows.jsonl", chats(iter(pairs)))
    if path.stem in REFUSE_PLAIN_CHATS:
        with pytest.raises(DataError, match="the chat template refuses this row"):
            found(rows, made)
    else:
        findings = found(rows, made)
        assert findings.keys() <= OF_TEMPLATES, findings


def test_there_are_twenty_sound_sets() -> None:
    assert len(SETS) + len(TEXTS) >= 20
