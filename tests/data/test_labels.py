"""Labelled rows: the numbers of labels, pairs of texts, long rows, findings, TSV files of GLUE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.data.checks import examine
from qlora_cli.data.contents import LabelledText
from qlora_cli.data.encode import Example, encode
from qlora_cli.data.encode_labels import LabelEncoder, encoded_texts, separates_texts
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.positions import check_seq_len, num_positions
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.row_store import Row
from qlora_cli.data.rows import read_rows
from qlora_cli.errors import InputError, RecipeError
from qlora_cli.jobs.data_findings import dataset_of
from qlora_cli.recipe.schema import Data
from tests.helpers.classifiers import encoder_config
from tests.helpers.runs import make_tokenizer
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

NAMES = LabelEncoder(("low", "high"))


def encoded(encoder: LabelEncoder, **fields: Any) -> Any:
    (result,) = encoder([Row("rows.jsonl:1", fields)], "classification", make_tokenizer())
    return result


@pytest.mark.parametrize(
    ("label", "value"), [("low", 0), ("high", 1), (" high ", 1), (1, 1), ("0", 0), (1.0, 1)]
)
def test_a_label_is_a_name_or_a_number(label: Any, value: int) -> None:
    example = encoded(NAMES, text="a", label=label)
    assert isinstance(example, Example)
    assert (example.value, example.num_targets) == (value, 1)


@pytest.mark.parametrize("label", ["hihg", 2, -1, 0.5, True, None, [], ""])
def test_another_label_is_an_error_of_the_row(label: Any) -> None:
    assert isinstance(encoded(NAMES, text="a", label=label), RowError)


def test_a_name_that_is_a_number_comes_before_the_number() -> None:
    """Labels 2, 0 in this order: `0` is the second class, not the first."""
    assert encoded(LabelEncoder(("2", "0")), text="a", label=0).value == 1


def test_a_regression_reads_numbers() -> None:
    assert encoded(LabelEncoder(), text="a", label="0.25").value == 0.25
    assert "is not a number" in str(encoded(LabelEncoder(), text="a", label="low"))
    assert "is not finite" in str(encoded(LabelEncoder(), text="a", label="nan"))


def test_other_formats_are_refused_by_both_tasks() -> None:
    rows = [Row("rows.jsonl:1", {"text": "a", "label": "low"})]
    with pytest.raises(InputError, match="task: classification needs a text and a label"):
        NAMES(rows, "text", make_tokenizer())
    with pytest.raises(InputError, match="set task: classification") as caught:
        encode(rows, "classification", make_tokenizer())
    assert "data.format: text" in str(caught.value)


def test_a_tokenizer_without_a_separator_gets_a_line_break() -> None:
    tokenizer = make_tokenizer()
    assert not separates_texts(tokenizer)
    (pair,) = encoded_texts([LabelledText("ab", "cd", None)], ["row"], tokenizer)
    assert tokenizer.decode(pair.ids) == "ab\ncd"
    assert pair.second == 0


def loaded(folder: Path, rows: list[Any], **settings: Any) -> tuple[RowLoader, Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data.model_validate({"train": str(file), "format": "classification", **settings})
    loader = RowLoader(data, make_tokenizer(), ModelLimits(), NAMES)
    return loader, loader.load()


def test_a_truncated_row_keeps_its_last_token_and_its_label(tmp_path: Path) -> None:
    rows = [{"text": "abcdefghij", "label": "high"}, {"text": "abc", "label": "low"}]
    loader, found = loaded(tmp_path, rows, seq_len=8)
    first, second = found.train.examples
    assert loader.tokenizer.decode(first.ids) == "abcdefgj"
    assert loader.tokenizer.decode(second.ids) == "abc"
    assert (first.value, second.value) == (1.0, 0.0)
    assert found.train.long_rows.policies == ["truncate"]
    assert np.array_equal(found.train.examples.targets, [1, 1])


def test_dropped_rows_are_reported(tmp_path: Path) -> None:
    rows = [{"text": "abcdefghij", "label": "high"}, {"text": "abc", "label": "low"}]
    _, found = loaded(tmp_path, rows, seq_len=8, long_rows="drop")
    assert len(found.train.examples) == 1


def codes(folder: Path, rows: list[Any]) -> dict[str, int]:
    loader, found = loaded(folder, rows)
    findings = examine(dataset_of(loader.data, found, loader.tokenizer, Path()))
    return {one.code: one.rows for one in findings}


def test_findings_about_labels(tmp_path: Path) -> None:
    sound = [{"text": f"text {i}", "label": ("low", "high")[i % 2]} for i in range(6)]
    assert codes(tmp_path, sound) == {}
    assert codes(tmp_path, [{**row, "label": "low"} for row in sound]) == {"one-label": 6}
    conflict = [*sound, {"text": "text 0", "label": "high"}]
    assert codes(tmp_path, conflict) == {"duplicates": 1, "label-conflict": 1}


def test_rows_with_other_labels_are_other_data(tmp_path: Path) -> None:
    """A resumed run is refused if only the labels have changed."""
    rows = [{"text": "a", "label": "low"}, {"text": "b", "label": "high"}]
    changed = [rows[0], {**rows[1], "label": "low"}]
    digests = [loaded(tmp_path, some)[1].train.examples.digest() for some in (rows, changed)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('a\tb\n"x" y\t1\n', ['"x" y', "1"]),
        ('a\tb\n"x\t1\n', ['"x', "1"]),
        ('a\tb\n"x ""y"""\t1\n', ['x "y"', "1"]),
        ('a\tb\n"x\ny"\t1\n', ["x\ny", "1"]),
    ],
)
def test_quotes_in_a_tsv_file(tmp_path: Path, text: str, cells: list[str]) -> None:
    """They are characters of the text unless they are around cells."""
    file = tmp_path / "rows.tsv"
    file.write_text(text)
    (row,) = read_rows(str(file))
    assert list(row.fields.values()) == cells


@needs_shared_data
def test_the_files_of_glue_are_read() -> None:
    counts = {"RTE/train": 2490, "RTE/dev": 277, "SST-2/dev": 872}
    for name, number in counts.items():
        assert len(read_rows(str(SHARED_DATA / "glue" / f"{name}.tsv"))) == number


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [(56, "set data.seq_len=8 or less, or a shorter prefix"), (57, "set a shorter prefix")],
)
def test_the_hint_about_a_prefix_names_only_what_helps(prefix: int, hint: str) -> None:
    data = Data(train="rows.jsonl", seq_len=64)
    with pytest.raises(RecipeError) as caught:
        check_seq_len(data, encoder_config("bert"), prefix)
    (problem,) = caught.value.problems
    assert problem.hint == hint


def test_positions_begin_after_that_of_padding_in_roberta() -> None:
    assert num_positions(encoder_config("roberta", pad_token_id=1)) == 62
    assert num_positions(encoder_config("bert")) == 64
