"""check_words.py finds each word of the old vocabulary and none in the checkout."""

from __future__ import annotations

from pathlib import Path

import check_words
import pytest

SEEDED = [
    "as it was told",  # words: allow
    "the code tells the user",  # words: allow
    "the road of a GPU",  # words: allow
    "the worst instant",  # words: allow
    "training goes on",  # words: allow
    "go on with --resume",  # words: allow
    "memory of a card",  # words: allow
    "the plan is imagined",  # words: allow
    "one speaker",  # words: allow
    "module surgery",  # words: allow
    "it judges both models",  # words: allow
    "the same first choice",  # words: allow
    "the how manyth block",  # words: allow
    'def f():\n    """Of A and B."""',  # words: allow
]


@pytest.mark.parametrize("text", SEEDED)
def test_a_seeded_word_is_found(tmp_path: Path, text: str) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"A good sentence.\n{text}\n")
    assert len(list(check_words.check([file], tmp_path))) == 1


def test_every_pattern_is_seeded(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("\n".join(SEEDED))
    found = {line.rpartition("-> ")[2] for line in check_words.check([file], tmp_path)}
    assert found == set(check_words.WORDS.values())


@pytest.mark.parametrize(
    "text",
    ["the model card", "broad and abroad", "a told line  # words: allow", "the discard pile"],
)
def test_other_words_are_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    assert list(check_words.check([file], tmp_path)) == []


def test_the_checkout_has_none(root: Path) -> None:
    assert list(check_words.check(check_words.tracked_files(root), root)) == []
