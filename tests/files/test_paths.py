"""Paths that the user wrote are expanded, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.files.paths import user_path


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")


@pytest.mark.parametrize("text", ["x" * 256, "a/" + "\u20ac" * 90, "a\0b", "a/\ud800"])
def test_a_text_that_cannot_be_a_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a path"):
        user_path(text)
