"""Two processes never train the same run; a process that was killed leaves no lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.runs.layout import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from qlora_cli.runs.layout import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.locked(new=sys.argv[2] == "new"):
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(run: RunFolder, how: str) -> Iterator[None]:
    """Hold the lock of a run in another process, which is killed at the end."""
    words = [sys.executable, "-c", HOLD, str(run.path), how]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.kill()
        process.communicate()


def assert_refused(run: RunFolder, message: str, *, new: bool) -> None:
    with pytest.raises(UsageError, match=message), run.locked(new=new):
        pass


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.locked(new=True):
        run.write({})
    with other_process(run, "resume"):
        assert_refused(run, "another process trains this run", new=False)
    with run.locked(new=False):
        assert run.run_json.is_file()


def test_a_new_run_can_use_the_folder_of_a_process_killed_at_its_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with other_process(run, "new"):
        assert_refused(run, "another process", new=True)
    (run.path / f".run.json.{'0' * 16}.partial").write_text("{")
    with run.locked(new=True):
        pass
    assert not run.path.exists(), "nothing was written, so nothing is left"


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "mine").touch()
    for new, message in ((True, "is in use"), (False, "is not a run's folder")):
        assert_refused(run, message, new=new)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
