"""Findings about the tokens of rows, and notes about their lengths."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.checks import examine, length_notes
from qlora_cli.data.encode import Example
from qlora_cli.data.encoded_dataset import EncodedDataset
from qlora_cli.data.finding_codes import CODES
from qlora_cli.data.findings import finding, stop_at_errors
from qlora_cli.data.text_checks import _digest
from qlora_cli.errors import DataError
from qlora_cli.nn.labels import IGNORE_INDEX
from tests.helpers.encoding import examples_of


def dataset(rows: list[list[int]], tokenizer: Any = None, **changed: Any) -> EncodedDataset:
    settings = {
        "examples": examples_of(
            [Example(ids, list(ids), f"rows.jsonl:{n}") for n, ids in enumerate(rows, 1)]
        ),
        "held_out": None,
        "format": "text",
        "tokenizer": tokenizer,
        "seq_len": 100,
        "packing": False,
    }
    return EncodedDataset(**{**settings, **changed})


class FewTokens:
    """The part of a tokenizer that these checks read."""

    bos_token, bos_token_id = "<s>", 1
    eos_token_id = 2
    unk_token, unk_token_id = "<unk>", 3
    chat_template = None

    def get_added_vocab(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2}


def test_unknown_tokens_are_counted() -> None:
    (found,) = examine(dataset([[1, 3, 5, 3, 2], [1, 6, 7, 8, 2]], FewTokens()))
    assert (found.code, found.rows) == ("unknown-tokens", 1)
    assert "2 times <unk>" in found.text


def test_sound_rows_have_no_findings() -> None:
    sound = dataset([[1, *range(n, n + 92), 2] for n in (4, 5, 6)], FewTokens())
    assert examine(sound) == ()
    assert not list(length_notes(sound, 3))


NOTES = [
    (dataset([[*range(97)]]), "1 row nearly fill data.seq_len=100"),
    (dataset([[*range(50)]]), "data.seq_len=50 is enough"),
    (dataset([[*range(50)]] * 2, packing=True), "to 100.0%"),
]


@pytest.mark.parametrize(("rows", "text"), NOTES, ids=[text for _, text in NOTES])
def test_lengths_are_noted(rows: EncodedDataset, text: str) -> None:
    assert any(text in note for note in length_notes(rows, 1))


def test_facts_are_those_of_the_tokens_of_each_row() -> None:
    """The arrays are compared with a plain loop over the rows, in parts and as pieces."""
    masked = [IGNORE_INDEX]
    rows = [
        Example([1, 5, 6, 7, 2], masked * 3 + [7, 2], "a.jsonl:1"),
        Example([1, 5, 6, 8, 2], masked * 3 + [8, 2], "a.jsonl:2"),
        Example([1, 9, 7, 2, 2], masked * 2 + [7, 2, IGNORE_INDEX], "a.jsonl:3"),
    ]
    facts = dataset([], FewTokens(), examples=examples_of(rows)).facts
    assert facts.prompt[0] == facts.prompt[1] != facts.prompt[2]
    assert facts.answer[0] == facts.answer[2] != facts.answer[1]
    assert len({*facts.digest.tolist()}) == 3
    for place, row in enumerate(rows):
        trained = [label for label in row.labels if label != IGNORE_INDEX]
        assert facts.begin[place] == row.ids[0]
        assert facts.second[place] == row.ids[1]
        assert facts.first[place] == row.labels.index(trained[0])
        assert facts.last[place] == row.ids[-1]
        assert facts.last_target[place] == trained[-1]
        assert facts.bos[place] == facts.early_bos[place] == row.ids.count(1)
    assert facts.tail.tolist() == [1, 1, 2]
    assert facts.before_tail.tolist() == [7, 8, 7]


def test_errors_stop_with_their_codes_and_warnings_do_not() -> None:
    shifted, padded = (
        finding("labels-shifted", 2, ["a:1", "a:2"]),
        finding("padded-rows", 1, ["a:3"]),
    )
    stop_at_errors([finding("html", 1, ["a:1"])])
    with pytest.raises(DataError) as caught:
        stop_at_errors([shifted, finding("html", 1, ["a:1"]), padded])
    assert [problem.where for problem in caught.value.problems] == ["labels-shifted", "padded-rows"]
    assert "--allow labels-shifted --allow padded-rows" in str(caught.value)


def test_codes_are_short_words() -> None:
    assert all(name == name.lower() and " " not in name and len(name) < 25 for name in CODES)


def test_the_digest_of_ascii_words_is_that_of_all_words() -> None:
    every = "".join(map(chr, range(128)))
    for text in (every, "A b_c\x1cd\ne", "", " ."):
        # A character that is not of ASCII and of no word selects the other code path.
        assert _digest([text]) == _digest([text + " \u2028"]), text
