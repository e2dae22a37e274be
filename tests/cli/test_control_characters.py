"""What a model generates and what a file contains has no control characters on the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qlora_cli.cli.output import escape_controls
from qlora_cli.ui.console import printable
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = "\x1b]0;owned\x07 \x9b31m \x7f \r\b \u202eevil\u2066 \ud800"
SAMPLED = ("--temperature", "5", "--max-new-tokens", "40")


@pytest.fixture(params=[{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}], ids=str)
def _colors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_colors")
def test_generated_text(tiny_base: Path) -> None:
    """A random model generates random bytes."""
    exact = qlora("generate", tiny_base, "--prompt", "a", *SAMPLED, "--json").json["text"]
    assert CONTROLS.search(exact), "no control character was generated, so nothing is tested"
    shown = qlora("generate", tiny_base, "--prompt", "a", *SAMPLED).out
    assert not CONTROLS.search(shown)
    assert shown == printable(exact) + "\n"


def test_generated_text_in_a_chat(tiny_base: Path) -> None:
    talk = qlora("chat", tiny_base, *SAMPLED, "--seed", "0", stdin="a\n\n")
    assert talk.code == 0
    assert talk.out.strip()
    assert not CONTROLS.search(talk.out + talk.err)


def test_generated_json_lines_are_exact(tiny_base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a\x1b\x9b\u202e"}) + "\n")
    out = qlora("generate", tiny_base, "--prompts", prompts, *SAMPLED).out
    assert not CONTROLS.search(out)
    (line,) = out.splitlines()
    assert json.loads(line)["prompt"] == "a\x1b\x9b\u202e"
    file = tmp_path / "answers.jsonl"
    assert qlora("generate", tiny_base, "--prompts", prompts, *SAMPLED, "--out", file).code == 0
    assert json.loads(file.read_text()) == json.loads(line)


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
def test_errors(job_recipe: Path, tmp_path: Path, as_json: tuple[str, ...]) -> None:
    """Names of files, fields and settings, and an error of a template."""
    name = HOSTILE.replace("\ud800", "")
    rows, recipe = tmp_path / f"{name.replace('/', '')}.jsonl", tmp_path / "hostile.yaml"
    rows.write_text(json.dumps({name: 1}) + "\n")
    recipe.write_text(json.dumps({"model": {"name": "starter"}, name: {HOSTILE: 1}}))
    template = tmp_path / "hostile.jinja"
    template.write_text("{{ raise_exception('" + name + "') }}")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    commands: list[list[str | Path]] = [
        ["data", job_recipe, f"data.train={rows}"],
        ["plan", recipe],
        ["data", job_recipe, f"data.train={chats}", f"data.template={template}"],
        ["report", tmp_path / name],
        ["generate", tmp_path / name, "--prompt", "a"],
    ]
    for command in commands:
        outcome = qlora(*command, *as_json)
        assert outcome.code == 2, outcome
        assert not CONTROLS.search(outcome.err + outcome.out), command
        assert "bug" not in outcome.err
        if as_json:
            assert outcome.json["exit_code"] == 2


def test_the_value_of_escaped_json_is_unchanged() -> None:
    escaped = escape_controls(json.dumps(HOSTILE, ensure_ascii=False))
    assert escaped.isprintable()
    assert json.loads(escaped) == HOSTILE
    assert printable("Grüße, 你好, שלום, ✓\ttab\n") == "Grüße, 你好, שלום, ✓\ttab\n"
