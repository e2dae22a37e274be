"""Rows that differ from another one in one word are found, and rows of one template are not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from qlora_cli.data.encode import Example
from qlora_cli.data.examples import Examples
from qlora_cli.data.similar_rows import differ_in_one_word, similar_rows
from qlora_cli.nn.labels import IGNORE_INDEX
from tests.helpers.encoding import examples_of

Text = list[int]


def row(prompt: Sequence[int], answer: Sequence[int], number: int = 0) -> Example:
    labels = [IGNORE_INDEX] * len(prompt) + [*answer]
    return Example([*prompt, *answer], labels, f"rows.jsonl:{number}")


def table(rows: Sequence[tuple[Text, Text]]) -> Examples:
    return examples_of([row(*pair, number) for number, pair in enumerate(rows, 1)])


def texts(number: int, length: int, seed: int = 0) -> list[Text]:
    chosen = random.Random(seed)
    return [[chosen.randrange(5, 5000) for _ in range(length)] for _ in range(number)]


def pairs(number: int, prompt: int = 30, answer: int = 20) -> list[tuple[Text, Text]]:
    return [*zip(texts(number, prompt), texts(number, answer, 1), strict=True)]


def replaced(text: Text, *places: int, by: Sequence[int] = (9999,)) -> Text:
    for place in reversed(places):
        text = [*text[:place], *by, *text[place + 1 :]]
    return text


PROMPT, ANSWER = texts(2, 30, seed=5)
SIMILAR = {
    "a word of the prompt": (replaced(PROMPT, 7), ANSWER),
    "a word of the answer": (PROMPT, replaced(ANSWER, 29)),
    "one of each": (replaced(PROMPT, 0), replaced(ANSWER, 3)),
    "an added word": (PROMPT, replaced(ANSWER, 9, by=(ANSWER[9], 7, 8))),
    "a removed word": (replaced(PROMPT, 9, by=()), ANSWER),
}
DIFFERENT = {
    "the same row": (PROMPT, ANSWER),
    "another answer": (PROMPT, texts(1, 30, seed=6)[0]),
    "another question": (texts(1, 30, seed=6)[0], ANSWER),
    "two words": (PROMPT, replaced(replaced(ANSWER, 5), 20, by=(8888,))),
    "a long part": (PROMPT, [*ANSWER[:9], *range(6000, 6004), *ANSWER[13:]]),
    "the end": (PROMPT, ANSWER[:20]),
    "a short answer": (PROMPT, [7, 8, 9]),
}


@pytest.mark.parametrize("name", SIMILAR)
def test_a_row_that_differs_in_one_word_is_found(name: str) -> None:
    rows = [*pairs(10), (PROMPT, ANSWER), *pairs(3, 41), SIMILAR[name]]
    assert similar_rows(table(rows)) == {14: 10}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_row_that_differs_more_is_not(name: str) -> None:
    assert not similar_rows(table([*pairs(10), (PROMPT, ANSWER), DIFFERENT[name]]))


def test_a_short_answer_must_be_the_same() -> None:
    rows = [(PROMPT, [5, 6]), (replaced(PROMPT, 3), [5, 7])]
    assert not similar_rows(table([*pairs(5), *rows]))
    rows[1] = (rows[1][0], [5, 6])
    assert similar_rows(table([*pairs(5), *rows])) == {6: 5}


def test_a_name_that_is_replaced_everywhere_is_one_difference() -> None:
    named = replaced(ANSWER, 4, 12, 25, by=(7777,))
    other = replaced(ANSWER, 4, 12, 25, by=(8888, 8889))
    two_words = replaced(replaced(named, 4), 25, by=(8888,))
    first, *others = ("".join(map(chr, text)) for text in (named, other, two_words))
    assert differ_in_one_word(first, others[0], 6)
    assert not differ_in_one_word(first, others[0], 5)
    assert not differ_in_one_word(first, others[1], 9)


def test_rows_of_one_template_are_not_similar() -> None:
    """They share a long prompt, and differ in one short word of the prompt and of the answer."""
    rows = [(replaced(PROMPT, 15, by=(n,)), replaced(ANSWER, 15, by=(2 * n,))) for n in range(40)]
    assert not similar_rows(table(rows))
    long = [*texts(1, 300, seed=8)[0]]
    assert not similar_rows(table([([*long, n, n + 1], [2 * n, 3 * n]) for n in range(40)]))


def test_a_row_of_a_template_that_comes_again_is_found() -> None:
    """What counts are the tokens that are not the template's: one of these 20 differs."""
    contents = texts(40, 20, seed=9)
    rows = [([*PROMPT, *content], ANSWER) for content in contents]
    again = ([*PROMPT, *replaced(contents[3], 10)], ANSWER)
    assert similar_rows(table([*rows, again])) == {40: 3}
    other = ([*PROMPT, *contents[3][:8], *texts(1, 12, seed=10)[0]], ANSWER)
    assert not similar_rows(table([*rows, other]))


def test_rows_of_another_set_are_compared() -> None:
    held_out = [*pairs(3, 41), (replaced(PROMPT, 3), ANSWER)]
    train = table([*pairs(4), (PROMPT, ANSWER)])
    assert similar_rows(train, table(held_out)) == {8: 4}


def test_all_similar_rows_among_many_are_found() -> None:
    rows = pairs(3000, 20, 20)
    chosen = random.Random(2)
    copies = chosen.sample(range(1000), 100)
    rows += [(prompt, replaced(answer, 6)) for prompt, answer in (rows[n] for n in copies)]
    assert similar_rows(table(rows)) == {3000 + i: n for i, n in enumerate(copies)}


def test_without_rows() -> None:
    assert not similar_rows(table([]))
    assert not similar_rows(table([([], [5])]))
