"""The text of an answer while it is generated, and the sampling settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_cli.errors import UsageError
from qlora_cli.jobs.answer_text import AnswerText
from qlora_cli.jobs.text_generator import Sampling


class Characters:
    """A tokenizer whose token ids are the bytes of the text."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return bytes(ids.tolist()).decode(errors="replace")


def generate(text: str, stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """Return the answer and the pieces that were passed on, if the model generates `text`."""
    pieces: list[str] = []
    ids = torch.tensor([[0, 0, *text.encode()]])
    answer = AnswerText(Characters(), 2, stop, pieces.append)
    for end in range(3, ids.shape[1] + 1):
        if answer(ids[:, :end], None).any():
            return answer.finish(ids[0, :end]), pieces
    return answer.finish(ids[0]), pieces


def test_pieces_add_up_to_the_answer() -> None:
    assert generate("one two") == ("one two", list("one two"))


def test_an_incomplete_character_is_not_passed_on() -> None:
    assert generate("aé€b") == ("aé€b", ["a", "é", "€", "b"])


def test_a_stop_text_ends_the_answer_and_is_never_passed_on() -> None:
    text, pieces = generate("one END two", stop=("END", "two"))
    assert text == "".join(pieces) == "one "


def test_the_start_of_a_stop_text_is_passed_on_once_it_is_none() -> None:
    text, pieces = generate("one EN", stop=("END",))
    assert text == "".join(pieces) == "one EN"
    assert generate("E two", stop=("END",))[0] == "E two"


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UsageError, match="no effect at temperature 0"):
        Sampling(top_p=0.5)
    with pytest.raises(UsageError, match="empty"):
        Sampling(stop=("",))
    assert Sampling(temperature=0.7, top_p=0.5).arguments["top_p"] == 0.5
