"""`qlora completion` prints a script that a shell can run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from qlora_cli.cli import main
from tests.helpers.cli_helpers import qlora
from tests.helpers.terminal import CTRL_U, QLORA, Terminal


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_calls_qlora(shell: str) -> None:
    outcome = qlora("completion", shell)
    assert outcome.code == 0
    assert f"_QLORA_COMPLETE={shell}_complete" in outcome.out


def test_bash_accepts_the_script(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(qlora("completion", "bash").out)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
def test_the_tab_key_completes_in_bash(tmp_path: Path) -> None:
    command = tmp_path / "qlora"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(QLORA)} "$@"\n')
    command.chmod(0o755)
    rows = tmp_path / "rows of mine.jsonl"
    rows.write_text("")
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Terminal("bash", "--norc", "--noprofile", "-i", PATH=path, PS1="ready:") as terminal:
        terminal.wait_for("ready:")
        terminal.type('eval "$(qlora completion bash)"\n')
        terminal.wait_for("ready:")
        terminal.type("qlora mer\t")
        terminal.wait_for("qlora merge ")
        terminal.type(f"{CTRL_U}qlora eval --num-f\t")
        terminal.wait_for("qlora eval --num-fewshot ")
        terminal.type(f"{CTRL_U}qlora plan star\t")
        terminal.wait_for("qlora plan starter ")
        terminal.type(f"{CTRL_U}qlora eval run --data {tmp_path}/rows\t")
        terminal.wait_for("rows\\ of\\ mine.jsonl ")
        terminal.type(f"{CTRL_U}exit\n")
        assert terminal.end()[0] == 0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("qlora recipe c", "plain,copy\n"),
        ("qlora recipe copy ch", "plain,chat\n"),
        ("qlora plan ./ch", "file,./ch\n"),
        ("qlora chat runs/", "file,runs/\n"),
        ("qlora completion f", "plain,fish\n"),
    ],
)
def test_names_and_paths_are_completed(words: str, wanted: str) -> None:
    *before, incomplete = words.split()
    complete = ShellComplete(main.qlora, {}, "qlora", "_QLORA_COMPLETE")
    items = complete.get_completions(before[1:], incomplete)
    assert "".join(f"{item.type},{item.value}\n" for item in items) == wanted


def test_an_unknown_shell_is_refused() -> None:
    assert qlora("completion", "tcsh").code == 2


def test_commands_are_completed() -> None:
    names = {"_QLORA_COMPLETE": "bash_complete", "COMP_WORDS": "qlora compl", "COMP_CWORD": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "qlora_cli"],
        env=os.environ | names,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert result.stdout == "plain,completion\n"
