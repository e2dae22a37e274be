"""The commands of docs/first-fine-tune.md work when they are typed in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_BASH = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def script(root: Path) -> str:
    page = (root / "docs" / "first-fine-tune.md").read_text(encoding="utf-8")
    return "".join(_BASH.findall(page))


def test_the_page_has_the_complete_job(script: str) -> None:
    commands = [line.split()[1] for line in script.splitlines() if line.startswith("qlora ")]
    assert commands == ["data", "plan", "train", "report", "generate", "merge", "verify"]


@pytest.mark.slow
def test_the_commands_work_in_an_empty_folder(script: str, tmp_path: Path) -> None:
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = re.findall(
        r"held-out loss +([\d.]+) before training, ([\d.]+) after", done.stdout
    )[0]
    assert float(after) < float(before) / 2
    assert "coming up" in done.stdout.split("speed")[-1]
    assert "verification passed" in done.stdout
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
