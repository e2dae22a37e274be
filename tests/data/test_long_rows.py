"""Rows longer than a sequence are dropped, truncated, split or refused, and counted."""

import json

import pytest

from qlora_cli.data.encode import Example
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.long_rows import LongRowsReport, fit_rows, policy_of
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Data
from tests.helpers.encoding import examples_of

LIMIT = 8


def example(length, trained_from=0, origin="rows.jsonl:1"):
    ids = list(range(length))
    labels = [IGNORE_INDEX] * trained_from + ids[trained_from:]
    return Example(ids, labels, origin)


def fitted(policy, *examples):
    report = LongRowsReport(LIMIT)
    return list(fit_rows(examples_of(examples), policy, report)), report


@pytest.mark.parametrize("policy", ["drop", "truncate", "split", "error"])
def test_rows_within_the_limit_are_unchanged(policy):
    rows, report = fitted(policy, example(LIMIT), example(2))
    assert rows == [example(LIMIT), example(2)]
    assert report.text() is None
    assert (report.rows, report.tokens, report.long_rows) == (2, LIMIT + 2, 0)


def test_dropped_rows_are_counted_and_named():
    rows, report = fitted("drop", example(2), example(30, origin="rows.jsonl:7"))
    assert rows == [example(2)]
    assert (report.dropped, report.lost_tokens) == (1, 30)
    assert report.text() == (
        "1 of 2 rows, with 93.8% of the tokens, are longer than 8 tokens and are dropped "
        "(93.8% of the tokens are left out): rows.jsonl:7 (30) (data.long_rows)"
    )


def test_a_truncated_row_keeps_its_beginning_and_a_trained_token():
    rows, report = fitted("truncate", example(20, 5), example(20, LIMIT))
    assert rows == [Example(list(range(8)), [IGNORE_INDEX] * 5 + [5, 6, 7], "rows.jsonl:1")]
    assert all(row.num_targets for row in rows)
    assert (report.dropped, report.untrained, report.lost_tokens) == (1, 1, 12 + 20)
    assert "1 without a trained token are left out completely" in report.text()


@pytest.mark.parametrize("length", [9, 16, 17, 25, 1000])
def test_the_pieces_of_a_split_row_are_the_row(length):
    rows, report = fitted("split", example(length))
    assert [token for row in rows for token in row.ids] == list(range(length))
    assert [label for row in rows for label in row.labels] == list(range(length))
    assert max(len(row.ids) for row in rows) <= LIMIT
    assert len(rows) == -(-length // LIMIT) == report.pieces
    assert all(row.num_targets for row in rows)
    assert rows[0].origin == f"rows.jsonl:1 [1/{len(rows)}]"
    assert (report.lost_tokens, report.dropped) == (0, 0)


def test_a_piece_without_a_trained_token_is_left_out_and_counted():
    rows, report = fitted("split", example(16, 8))
    assert [row.ids for row in rows] == [list(range(8, 16))]
    assert (report.untrained, report.lost_tokens) == (1, 8)


def test_long_rows_that_are_errors_are_named_with_the_length_needed():
    rows = [example(length, origin=f"rows.jsonl:{length}") for length in (1, 50, 2, 90)]
    with pytest.raises(DataError, match="2 of 4 rows") as caught:
        fitted("error", *rows)
    assert [problem.where for problem in caught.value.problems] == [
        "rows.jsonl:50",
        "rows.jsonl:90",
    ]
    assert "the longest row has 90 tokens" in str(caught.value)


def test_auto_splits_text_and_drops_other_rows():
    assert policy_of("auto", "text") == "split"
    assert {policy_of("auto", name) for name in ("messages", "completion", "tokens")} == {"drop"}
    assert policy_of("truncate", "text") == "truncate"


def test_the_limit_is_the_smaller_of_seq_len_and_positions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a day " * 100}))
    tokenizer = load_tokenizer("starter")
    for seq_len, positions in ((16, 512), (512, 16)):
        data = Data(train=str(path), seq_len=seq_len)
        limits = ModelLimits(positions=positions)
        rows = RowLoader(data, tokenizer, limits).file(str(path))
        assert max(len(row.ids) for row in rows.examples) == 16
        assert len(rows.examples) == rows.long_rows.pieces > 1
        assert "1 of 1 rows" in RowLoader(data, tokenizer, limits).load().notes[0]


def test_no_row_left_is_an_error_with_the_length_needed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input_ids": [1] * 30}))
    with pytest.raises(DataError, match="no row is left") as caught:
        RowLoader(Data(train=str(path), seq_len=8), None, ModelLimits(vocab_size=9)).file(str(path))
    assert "30 tokens" in str(caught.value)
