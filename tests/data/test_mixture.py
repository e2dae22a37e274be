"""Sources, weights, shares and limits choose the same rows everywhere."""

import json
from collections import Counter

import pytest

from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.mixture import choice_notes, read_data, sources_text
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, InputError
from qlora_cli.recipe.schema import Data


def write_rows(path, number, name="row"):
    rows = [json.dumps({"text": f"{name} {n}"}) for n in range(number)]
    path.write_text("\n".join(rows))
    return str(path)


def data(train, **settings):
    return Data.model_validate({"train": train, **settings})


def origins(rows):
    return [row.origin for row in rows]


def test_the_end_of_a_single_text_is_held_out(tmp_path):
    text = "".join(f"line {n}\n" for n in range(200))
    (tmp_path / "book.txt").write_text(text)
    rows = read_data(data(str(tmp_path / "book.txt"), eval=0.1))
    assert (len(rows.train), len(rows.held_out)) == (1, 1)
    first, last = rows.train[0].fields["text"], rows.held_out[0].fields["text"]
    assert first + last == text
    assert last.startswith("line ")
    assert 0.1 <= len(last) / len(text) < 0.12
    (note,) = choice_notes(data("x", eval=0.1), rows.sources, 1)
    assert "the end of the only text is held out" in note


def test_a_single_row_of_another_format_has_no_share(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(DataError, match="needs at least two rows"):
        read_data(data(str(tmp_path / "rows.jsonl"), eval=0.1))


def test_a_share_of_the_rows_is_held_out(tmp_path):
    where = write_rows(tmp_path / "rows.jsonl", 200)
    rows = read_data(data(where, eval=0.05))
    assert (len(rows.train), len(rows.held_out)) == (190, 10)
    assert not set(origins(rows.train)) & set(origins(rows.held_out))
    assert origins(rows.held_out) == origins(read_data(data(where, eval=0.05)).held_out)
    assert origins(rows.held_out) != origins(read_data(data(where, eval=0.05, seed=1)).held_out)
    for chosen in (rows.train, rows.held_out):
        numbers = [int(row.origin.split(":")[1]) for row in chosen]
        assert numbers == sorted(numbers)


def test_a_share_is_at_least_one_row_and_leaves_one(tmp_path):
    rows = read_data(data(write_rows(tmp_path / "rows.jsonl", 2), eval=0.01))
    assert (len(rows.train), len(rows.held_out)) == (1, 1)
    with pytest.raises(DataError, match="at least two rows"):
        read_data(data(write_rows(tmp_path / "rows.jsonl", 1), eval=0.5))


@pytest.mark.parametrize(("max_rows", "numbers"), [(9, (9, 1)), (45, (45, 5)), (99, (90, 10))])
def test_a_share_is_of_the_rows_that_are_used(tmp_path, max_rows, numbers):
    where = write_rows(tmp_path / "rows.jsonl", 100)
    rows = read_data(data(where, eval=0.1, max_rows=max_rows))
    assert (len(rows.train), len(rows.held_out)) == numbers
    assert not set(origins(rows.train)) & set(origins(rows.held_out))


def test_every_command_reads_the_same_share(tmp_path):
    settings = data(write_rows(tmp_path / "rows.jsonl", 40), eval=0.1, max_rows=20)
    loader = RowLoader(settings, load_tokenizer("starter"), ModelLimits())
    loaded = loader.load()
    assert loaded.held_out.examples == loader.held_out().examples
    assert loaded.train.examples == loader.train().examples
    assert (len(loaded.train.examples), len(loaded.held_out.examples)) == (20, 2)
    assert [note.split(":")[0] for note in loaded.notes] == ["data.eval=0.1", "data.max_rows=20"]


def test_weights_repeat_and_sample_rows(tmp_path):
    first = write_rows(tmp_path / "first.jsonl", 10)
    second = write_rows(tmp_path / "second.jsonl", 10)
    mixture = [{"path": first, "weight": 2.5}, {"path": second, "weight": 0.3}]
    rows = read_data(data(mixture))
    assert [source.used for source in rows.sources] == [25, 3]
    assert [source.read for source in rows.sources] == [10, 10]
    counts = Counter(row.origin for row in rows.train if row.file == "first.jsonl")
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    assert origins(rows.train) == origins(read_data(data(mixture)).train)
    (note,) = choice_notes(data(mixture), rows.sources, 0)
    assert f"25 from {first} (weight 2.5)" in note
    assert sources_text(mixture and data(mixture).train) == f"{first}, {second}"
    assert sources_text(0.1) == "data.eval=0.1"


def test_a_held_out_row_is_not_repeated_by_a_weight(tmp_path):
    mixture = [{"path": write_rows(tmp_path / "rows.jsonl", 20), "weight": 3}]
    rows = read_data(data(mixture, eval=0.25))
    assert (len(rows.train), len(rows.held_out)) == (45, 5)
    assert not set(origins(rows.train)) & set(origins(rows.held_out))


def test_at_most_max_rows_are_used_in_their_order(tmp_path):
    where = write_rows(tmp_path / "rows.jsonl", 100)
    rows = read_data(data(where, max_rows=7)).train
    numbers = [int(row.origin.split(":")[1]) for row in rows]
    assert len(numbers) == 7
    assert numbers == sorted(numbers)
    assert numbers != list(range(1, 8))
    assert len(read_data(data(where, max_rows=1000)).train) == 100


def test_files_of_a_mixture_may_have_different_formats(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", 2)
    second = tmp_path / "b.csv"
    second.write_text("prompt,completion\nq,a\n")
    third = tmp_path / "c.txt"
    third.write_text("A novel. " * 200)
    settings = data([first, str(second), str(third)], seq_len=64)
    rows = RowLoader(settings, load_tokenizer("starter"), ModelLimits()).load().train
    assert rows.format == "text"
    assert rows.long_rows.policies == ["split"]
    assert [row.origin for row in rows.examples[:3]] == ["a.jsonl:1", "a.jsonl:2", "b.csv:2"]
    assert len(rows.examples) == 3 + rows.long_rows.pieces


def test_settings_that_cannot_be_applied_are_refused(tmp_path):
    where = write_rows(tmp_path / "rows.jsonl", 2)
    with pytest.raises(InputError, match="did you mean prompt"):
        read_data(data(where, columns={"promt": "text"}))
    with pytest.raises(InputError, match=r"weights apply to data\.train only"):
        read_data(data(where, eval=[{"path": where, "weight": 2}]))
    with pytest.raises(InputError, match="leaves no row"):
        read_data(data([{"path": where, "weight": 0.1}]))
    with pytest.raises(InputError, match=r"data\.eval: no file .*") as caught:
        read_data(data(where, eval=str(tmp_path / "absent.jsonl")))
    assert "data.eval=0.02" in caught.value.hint
