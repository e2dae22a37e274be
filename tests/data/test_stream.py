"""Rows that are encoded in parts, in processes and through files are those encoded in one go."""

import json
import os
import pickle
import random

import pytest

from qlora_cli.data import load, processes, row_store, stream
from qlora_cli.data.encode import Example
from qlora_cli.data.encode import encode as encode_rows
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.mixture import read_data
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.data.processes import workers
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.stream import groups_of
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, ModelError, QloraError
from qlora_cli.recipe.schema import Data
from tests.helpers.encoding import examples_of
from tests.helpers.observers import StageRecorder

LIMITS = ModelLimits(vocab_size=10**6, positions=48)


def write_chats(path, number, first=0):
    randomness = random.Random(first)
    rows = []
    for n in range(first, first + number):
        question = " ".join(["why"] * randomness.randrange(1, 9))
        turns = [{"role": "user", "content": f"{question} {n}?"}]
        turns.append({"role": "assistant", "content": " yes" * randomness.randrange(1, 20)})
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def mixture(tmp_path):
    """Files of several formats, with rows that are too long."""
    chats = write_chats(tmp_path / "chats.jsonl", 60)
    more = write_chats(tmp_path / "more.jsonl", 20, first=1000)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("prompt,completion\n" + "".join(f"q {n},a {n}\n" for n in range(30)))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"day {n} " * n}) for n in range(1, 40)))
    return [chats, {"path": more, "weight": 1.5}, str(pairs), str(texts)]


@pytest.fixture
def small_parts(monkeypatch):
    """Limits at which a few rows are many."""
    monkeypatch.setattr(stream, "PART_ROWS", 7)
    monkeypatch.setattr(stream, "_PART_BYTES", 500)
    monkeypatch.setattr(row_store, "_IN_MEMORY", 100)
    monkeypatch.setattr(row_store, "_AT_ONCE", 3)
    monkeypatch.setattr(load, "_MAPPED_ROWS", 1)


def loader_of(train, **settings):
    data = Data.model_validate({"train": train, "seq_len": 40, "template": "chatml", **settings})
    return RowLoader(data, with_template(load_tokenizer("starter"), data), LIMITS)


def in_one_go(loader):
    """Return the examples of the training rows before `data.long_rows`, encoded group by group."""
    examples = []
    for row_format, rows in groups_of(read_data(loader.data).train, loader.data):
        examples += encode_rows(list(rows), row_format, loader.tokenizer, vocab_size=10**6)
    assert all(isinstance(example, Example) for example in examples)
    return examples


SETTINGS = [
    {},
    {"long_rows": "truncate", "max_rows": 50},
    {"long_rows": "split", "eval": 0.2, "seed": 3},
    {"long_rows": "drop", "eval": 0.3, "max_rows": 40, "packing": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_in_parts_and_files_are_those_in_one_go(mixture, settings, small_parts):
    loader = loader_of(mixture, **settings)
    whole = loader_of(mixture, **settings | {"seq_len": 10**6})
    unlimited = RowLoader(whole.data, whole.tokenizer, ModelLimits(vocab_size=10**6))
    assert unlimited.train().examples == in_one_go(loader)
    loaded, again = loader.load(), loader.load()
    assert loaded.train.examples == again.train.examples == loader.train().examples
    if "eval" in settings:
        assert loaded.held_out.examples == loader.held_out().examples
    assert loaded.train.long_rows.long_rows > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS[::2])
def test_several_processes_give_the_rows_of_one(mixture, settings, small_parts):
    one, two = (loader_of(mixture, processes=n, **settings).load() for n in (1, 2))
    assert one.train.examples == two.train.examples
    assert one.train.long_rows == two.train.long_rows
    assert (one.notes, one.sources) == (two.notes, two.sources)
    assert one.held_out is None or one.held_out.examples == two.held_out.examples


def faulty_files(folder):
    """Files with faulty rows of each kind -> the lines that an error must name."""
    good = {"prompt": "q", "completion": "a"}
    rows = [dict(good) for _ in range(40)]
    for line in (3, 20, 39):
        rows[line - 1]["completion"] = 7
    empty = [{"input_ids": [1, 2]} for _ in range(30)]
    for line in (2, 29):
        empty[line - 1] = {"input_ids": [1]}
    empty[9] = {"input_ids": [1, 10**7]}
    for name, content, lines in (("fields", rows, [3, 20, 39]), ("tokens", empty, [2, 10, 29])):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, content)))
        yield str(path), [f"{path.name}:{line}" for line in lines], len(content)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_faulty_rows_of_a_file_are_in_one_error(tmp_path, processes, small_parts):
    for path, places, number in faulty_files(tmp_path):
        with pytest.raises(DataError) as caught:
            loader_of(path, processes=processes).load()
        assert [problem.where for problem in caught.value.problems] == places
        assert f"{len(places)} of {number} rows cannot be used" in str(caught.value)


def test_faulty_fields_are_reported_before_other_faults(tmp_path, small_parts):
    rows = [{"input_ids": [1]}, *[{"input_ids": [1, 2]}] * 20, {"input_ids": ["a"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="as tokens rows") as caught:
        loader_of(str(path)).load()
    assert [problem.where for problem in caught.value.problems] == ["rows.jsonl:22"]


def test_broken_lines_of_all_files_are_in_one_error(tmp_path, small_parts):
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text('{"text": "x"}\n' * 20 + '{"text"\n' + '{"text": "x"}\n')
    with pytest.raises(DataError, match="2 of 44 rows") as caught:
        loader_of([str(path) for path in paths]).load()
    assert [problem.where for problem in caught.value.problems] == ["a.jsonl:21", "b.jsonl:21"]


@pytest.mark.slow
def test_errors_of_other_processes_are_raised_here(tmp_path, small_parts):
    loader = loader_of(write_chats(tmp_path / "chats.jsonl", 40), processes=2)
    loader.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="need a chat template"):
        loader.load()


def exit_at_three(number):
    if number == 3:
        os._exit(1)
    return number


@pytest.mark.slow
def test_a_killed_process_is_reported():
    with (
        pytest.raises(QloraError, match="was killed"),
        workers(exit_at_three, 2, [__name__]) as apply,
    ):
        list(apply(range(10)))


@pytest.mark.slow
def test_results_of_processes_are_in_order_and_few_wait():
    taken = []
    with workers(abs, 2) as apply:
        results = apply(taken.append(n) or -n for n in range(40))
        assert next(results) == 0
        assert len(taken) <= 2 * processes._WAITING + 1
        assert list(results) == list(range(1, 40))


def test_errors_of_rows_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(RowError("no", "a hint")))
    assert (str(error), error.hint) == ("no", "a hint")


def test_a_schedule_of_mapped_rows_is_that_of_lists(mixture, small_parts):
    examples = loader_of(mixture).load().train.examples
    settings = {"seq_len": 40, "packing": True, "micro_batch": 2, "grad_accum": 2, "seed": 1}
    mapped, listed = (BatchSchedule(rows, **settings) for rows in (examples, list(examples)))
    for step in range(2 * mapped.steps_per_epoch):
        assert mapped.sizes(step) == listed.sizes(step)
        pairs = zip(mapped.step_batches(step), listed.step_batches(step), strict=True)
        assert all(one.input_ids.equal(other.input_ids) for one, other in pairs)


def test_labels_that_are_not_the_tokens_are_kept():
    rows = [Example([1, 2, 3], [-100, 9, 3], "a:1"), Example([4], [4], "a:2")]
    assert list(examples_of(rows)) == rows


def test_reading_a_large_file_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_cli.data.rows._LARGE", 0)
    monkeypatch.setattr("qlora_cli.data.rows._BETWEEN_REPORTS", 10)
    observer = StageRecorder()
    loader_of(write_chats(tmp_path / "chats.jsonl", 30)).load(observer)
    assert [name for name, _ in observer.stages] == ["read", "tokenize"]
    assert observer.stages[1] == ("tokenize", 30)
