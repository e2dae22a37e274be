"""`chat`, `generate` and `eval` in a real terminal: what is typed, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_base
from tests.helpers.terminal import CTRL_C, CTRL_D, QLORA, Terminal

pytestmark = pytest.mark.slow

LENGTH = 2048
LONG = ("--max-new-tokens", str(LENGTH - 100))
END_TOKEN = 2


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template whose answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("endless")
    make_base(folder, "llama", max_position_embeddings=LENGTH)
    weights = load_file(folder / "model.safetensors")
    # Its logit is then 0, and the largest of 259 random logits is above 0.
    weights["lm_head.weight"][END_TOKEN] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_chat_goes_on_after_ctrl_c_and_wrong_commands(endless: Path) -> None:
    with Terminal(*QLORA, "chat", endless, *LONG) as terminal:
        terminal.wait_for("base answers. /help lists the commands.")
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        terminal.wait_for_length(20)
        terminal.type(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        assert "/use NAME       answer with another adapter (base)" in terminal.wait_for("> ")
        terminal.type("/system Be brief.\n")
        terminal.wait_for("the system prompt is set; the conversation starts over")
        terminal.type("/reset\n")
        terminal.wait_for("the conversation starts over\r\n> ")
        terminal.type("/foo\n")
        terminal.wait_for("there is no command /foo; /help lists them")
        terminal.type("/use nothing\n")
        terminal.wait_for("there is no adapter 'nothing'")
        terminal.wait_for("> ")
        terminal.type("Again\n")
        terminal.wait_for("Again\r\n")
        terminal.wait_for_length(20)
        terminal.type(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.end()[0] == 0


def test_ctrl_c_at_the_prompt_ends_a_chat_at_the_second_time(endless: Path) -> None:
    with Terminal(*QLORA, "chat", endless) as terminal:
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        code, rest = terminal.end(key=CTRL_C)
    assert code == 0
    assert "Ctrl-C again, an empty line or Ctrl-D ends the chat" in rest
    assert "stopped" not in rest  # The half line was not sent.


def test_ctrl_c_keeps_the_generated_text(endless: Path) -> None:
    prompt = ("generate", endless, "--prompt", "Hello")
    start = qlora(*prompt, "--max-new-tokens", "8").out[:3]
    with Terminal(*QLORA, *prompt, *LONG) as terminal:
        terminal.wait_for("--raw sends it as it is")
        terminal.wait_for(start)
        terminal.type(CTRL_C)
        code, rest = terminal.end()
    assert code == 130
    assert "Traceback" not in rest


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_ctrl_c_keeps_complete_answers(command: str, endless: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    row = json.dumps({"prompt": "Hello", "completion": "World"})
    rows.write_text(f"{row}\n" * 200)
    options = {"generate": ("--prompts", rows, "--out"), "eval": ("--data", rows, "--generate")}
    arguments = (command, endless, *options[command], out, "--max-new-tokens", "30")
    with Terminal(*QLORA, *arguments) as terminal:
        while not out.exists() or out.read_text().count("\n") < 2:
            time.sleep(0.02)
        terminal.type(CTRL_C)
        code, rest = terminal.end()
    assert code == 130
    assert "stopped; the complete answers are in the file" in rest
    lines = out.read_text().splitlines(keepends=True)
    assert 2 <= len(lines) < 200
    assert all(line.endswith("\n") and json.loads(line)["prompt"] for line in lines)
