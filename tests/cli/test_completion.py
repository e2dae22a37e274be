"""`qlora completion` prints a script that a shell can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_calls_qlora(shell: str) -> None:
    outcome = qlora("completion", shell)
    assert outcome.code == 0
    assert f"_QLORA_COMPLETE={shell}_complete" in outcome.out


def test_bash_accepts_the_script(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(qlora("completion", "bash").out)
    subprocess.run(["bash", "-n", script], check=True)


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
