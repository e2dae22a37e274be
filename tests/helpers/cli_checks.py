"""Checks that several tests of the command line share."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.cli_helpers import Outcome, qlora


def assert_refused(outcome: Outcome, code: int, *words: str | Path) -> None:
    """Assert that the command printed one error and no output, and exited with `code`.

    words: texts that the error must contain.
    """
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("error: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "unexpected" not in outcome.err, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def assert_folder_is_usable(recipe: Path) -> None:
    """Assert that a refused run left no file in its folder `run`, and that a correct run works."""
    assert not file_contents(recipe.parent / "run")
    outcome = qlora("train", recipe, "train.steps=1")
    assert outcome.code == 0, outcome.err


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder: relative path -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def truncate(file: Path) -> None:
    """Remove the last 100 bytes of a file."""
    file.write_bytes(file.read_bytes()[:-100])
