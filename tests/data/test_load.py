"""Every command reads rows by the same path and refuses the same rows."""

import json

import pytest

from qlora_cli.data import conversation, fast_tokens, load
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError
from qlora_cli.events import Silent
from qlora_cli.files.locate import STARTER_FOLDER, read_config
from qlora_cli.jobs import data as data_job
from qlora_cli.jobs import evaluate
from qlora_cli.jobs.prepare import prepare, read_rows
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.schema import Data, Recipe
from tests.helpers.observers import NoteRecorder
from tests.helpers.vocabularies import byte_level_of

LIMITS = ModelLimits.of(read_config(STARTER_FOLDER / "config.json"))


def write_rows(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def starter_recipe(where):
    return Recipe.model_validate(
        {
            "model": {"name": "starter"},
            "data": {"train": where, "seq_len": LIMITS.positions, "long_rows": "error"},
        }
    )


def by_data_command(where):
    return data_job.run(starter_recipe(where), show=0)


def by_training(where):
    return read_rows(prepare(starter_recipe(where), inspect_device()))


def by_evaluation(where):
    return evaluate.run("starter", data=where, observer=Silent())


@pytest.mark.parametrize("command", [by_data_command, by_training, by_evaluation])
@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"input_ids": [5, LIMITS.vocab_size]}, f"vocabulary ends at {LIMITS.vocab_size - 1}"),
        ({"text": ""}, "'text' is empty"),
    ],
    ids=["vocabulary", "fields"],
)
def test_every_command_refuses_the_same_rows(tmp_path, command, row, fault):
    good = {"input_ids": [5, 6]} if "input_ids" in row else {"text": "A day."}
    where = write_rows(tmp_path, good, row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        command(where)
    assert fault in str(caught.value)


@pytest.mark.parametrize("command", [by_data_command, by_training])
def test_a_row_that_exceeds_the_positions_is_refused_if_long_rows_are_errors(tmp_path, command):
    where = write_rows(tmp_path, {"input_ids": [5, 6]}, {"input_ids": [5] * (LIMITS.positions + 1)})
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        command(where)
    assert f"longer than {LIMITS.positions:,} tokens" in str(caught.value)


def test_an_evaluation_leaves_out_rows_that_exceed_the_positions_and_counts_them(tmp_path):
    where = write_rows(tmp_path, {"input_ids": [5, 6]}, {"input_ids": [5] * (LIMITS.positions + 1)})
    observer = NoteRecorder()
    assert evaluate.run("starter", data=where, observer=observer).tokens == 1
    (note,) = [note for note in observer.notes if "longer than" in note]
    assert note.startswith("1 of 2 rows")
    assert "rows.jsonl:2" in note


@pytest.mark.parametrize("command", [by_data_command, by_training, by_evaluation])
def test_every_command_accepts_a_row_that_fills_the_positions(tmp_path, command):
    assert command(write_rows(tmp_path, {"input_ids": [5] * LIMITS.positions}))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    where = write_rows(tmp_path, {"text": "A day."})
    tokenizer = load_tokenizer("starter")
    with pytest.raises(DataError, match="the vocabulary ends at 9"):
        RowLoader(Data(train=where), tokenizer, ModelLimits(vocab_size=10)).file(where)


def test_the_conversation_of_a_row_is_built_once(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    where = write_rows(tmp_path, *[{"messages": chat}] * 3)
    build, built = conversation._conversation, []
    monkeypatch.setattr(
        conversation, "_conversation", lambda *given: built.append(given) or build(*given)
    )
    tokenizer = load_tokenizer("starter")
    assert len(RowLoader(Data(train=where), tokenizer, LIMITS).file(where).examples) == 3
    assert len(built) == 3


def test_a_part_of_the_rows_can_be_selected(tmp_path):
    where = write_rows(tmp_path, *({"text": f"Day {n}."} for n in range(5)), {"text": 3})
    tokenizer = load_tokenizer("starter")
    rows = RowLoader(Data(train=where), tokenizer, LIMITS).file(where, slice(2))
    assert [example.origin for example in rows.examples] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert rows.format == "text"


def test_progress_is_reported_over_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_cli.data.stream.PART_ROWS", 2)

    class Progress(Silent):
        def __init__(self):
            self.events = []

        def stage(self, name, total):
            self.events.append((name, total))

        def advance(self, done):
            self.events.append(done)

    where = write_rows(tmp_path, *({"text": f"Day {n}."} for n in range(5)))
    (tmp_path / "eval.csv").write_text("prompt,completion\nq,a\n")
    data, observer = Data(train=where, eval=str(tmp_path / "eval.csv")), Progress()
    RowLoader(data, load_tokenizer("starter"), LIMITS).load(observer)
    assert observer.events == [("tokenize", 6), 2, 4, 5, 6]


@pytest.mark.parametrize("row", [{"text": "A day."}, {"input_ids": [5, 6]}], ids=["text", "tokens"])
def test_many_rows_bring_a_hint_to_the_faster_library(tmp_path, monkeypatch, row):
    monkeypatch.setattr(load, "_MANY_ROWS", 2)
    monkeypatch.setattr(fast_tokens, "find_spec", lambda name: None)
    data = Data(train=write_rows(tmp_path, row, row))
    observer = NoteRecorder()
    RowLoader(data, byte_level_of("gpt-2"), ModelLimits()).load(observer)
    assert [note for note in observer.notes if "fast-tokens" in note] == observer.notes
    assert len(observer.notes) == ("text" in row)
