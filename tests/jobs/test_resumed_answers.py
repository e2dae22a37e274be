"""`qlora generate --resume` counts complete answers and changes no file that is something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.jobs.generate import Prompt, count_answers

CHAT = [{"role": "user", "content": "Hello"}]
PROMPTS = [Prompt("one"), Prompt("zwei äöü"), Prompt(json.dumps(CHAT), CHAT)]


def line(prompt: Prompt) -> str:
    content = {"prompt": prompt.content, "text": "an answer", "answers": {}, "format": "plain"}
    return json.dumps(content, ensure_ascii=False)


LINES = [line(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("count", range(4))
def test_complete_answers_are_counted_and_kept(count: int, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    content = "".join(f"{line}\n" for line in LINES[:count])
    file.write_text(content)
    assert count_answers(file, PROMPTS) == count
    assert file.read_text() == content


def test_no_file_has_no_answer(tmp_path: Path) -> None:
    assert count_answers(tmp_path / "absent", PROMPTS) == 0


@pytest.mark.parametrize("length", [1, 8, 22, 40])
def test_an_incomplete_line_is_removed(length: int, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(f"{LINES[0]}\n".encode() + LINES[1].encode()[:length])
    assert count_answers(file, PROMPTS) == 1
    assert file.read_text() == f"{LINES[0]}\n"


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("A text of the user.", 1),
        ("A text of the user.\n", 1),
        (f"{LINES[1]}\n", 1),
        (f"{LINES[0]}\n\n", 2),
        (f"{LINES[0]}\nA text", 2),
        ("".join(f"{line}\n" for line in [*LINES, LINES[0]]), 4),
        ("".join(f"{line}\n" for line in LINES) + "A text", 4),
    ],
)
def test_other_files_are_refused_and_not_changed(content: str, number: int, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=f"jsonl:{number}: it is not the answer to prompt"):
        count_answers(file, PROMPTS)
    assert file.read_text() == content
