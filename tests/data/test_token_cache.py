"""Tokens in the cache are those of the rows, and anything that changes them makes a new entry."""

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from qlora_cli.data import token_cache
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, InputError, QloraError
from qlora_cli.files.cache import entries
from qlora_cli.recipe.schema import Data
from tests.helpers.observers import StageRecorder

LIMITS = ModelLimits(vocab_size=10**6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache that keeps the tokens of small files."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_MIN_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"day {n}"}) for n in range(20)))
    return path


def load(path, limits=LIMITS, template=None, observer=None, **settings):
    data = Data.model_validate({"train": str(path), "template": template, **settings})
    tokenizer = with_template(load_tokenizer("starter"), data)
    observer = observer or StageRecorder()
    return RowLoader(data, tokenizer, limits).load(observer), observer


def is_tokenized(path, **changed):
    """Whether loading the rows tokenizes them."""
    return ("tokenize", 20) in load(path, **changed)[1].stages


def test_the_second_run_tokenizes_nothing_and_has_the_same_rows(rows):
    settings = {"eval": 0.2, "seq_len": 8, "max_rows": 10}
    first, observer = load(rows, **settings)
    assert observer.stages == [("tokenize", 12)]
    second, observer = load(rows, **settings)
    assert observer.stages == []
    uncached, _ = load(rows, cache=False, **settings)
    for loaded in (second, uncached):
        assert list(loaded.train.examples) == list(first.train.examples)
        assert list(loaded.held_out.examples) == list(first.held_out.examples)
        assert (loaded.notes, loaded.sources) == (first.notes, first.sources)
        assert (loaded.train.format, loaded.train.long_rows) == ("text", first.train.long_rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"template": "chatml"},
        {"columns": {"text": "text"}},
        {"max_rows": 20},
        {"eval": 0.5},
        {"seed": 1},
        {"limits": ModelLimits(vocab_size=10**5)},
        {"format": "text"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_that_changes_the_tokens_makes_a_new_entry(rows, changed):
    load(rows)
    load(rows, **changed)
    assert len(entries()) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"seq_len": 16},
        {"long_rows": "truncate"},
        {"packing": False},
        {"processes": 1},
        {"limits": ModelLimits(vocab_size=10**6, positions=9)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_use_the_same_entry(rows, changed):
    load(rows)
    assert not is_tokenized(rows, **changed)


def test_a_changed_file_makes_a_new_entry_and_its_date_does_not(rows):
    load(rows)
    rows.touch()
    assert not is_tokenized(rows)
    rows.write_text(rows.read_text().replace("day 7", "way 7"))
    assert is_tokenized(rows)
    assert len(entries()) == 2


def test_a_changed_tokenizer_makes_a_new_entry(rows):
    load(rows)
    data, tokenizer = Data(train=str(rows)), load_tokenizer("starter")
    tokenizer.add_tokens(["ay"])
    RowLoader(data, tokenizer, LIMITS).load()
    assert len(entries()) == 2


def test_a_template_that_writes_the_date_makes_an_entry_per_day(rows, monkeypatch):
    tokenizer = load_tokenizer("starter")
    tokenizer.chat_template = "{{ strftime_now('%d') }}"
    keys = set()
    for day in ("2026-01-01", "2026-01-02"):
        monkeypatch.setattr(token_cache, "date", type("", (), {"today": lambda day=day: day}))
        keys.add(token_cache.key_for(Data(train=str(rows)), tokenizer, 9, load).folder)
    assert len(keys) == 2


def damaged(cache):
    """Yield functions that damage the one entry."""
    (entry,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    table = entry / "train.arrow"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    yield lambda: table.write_bytes(content)
    yield lambda: table.write_bytes(table.read_bytes()[:-100])
    yield table.unlink
    yield lambda: (entry / "entry.json").write_text("{")
    yield (entry / "entry.json").unlink


@pytest.mark.parametrize("fault", range(5), ids=["bit", "cut", "absent", "no JSON", "no entry"])
def test_a_damaged_entry_is_tokenized_again(rows, cache, fault):
    first, _ = load(rows)
    expected = list(first.train.examples)
    list(damaged(cache))[fault]()
    second, observer = load(rows)
    assert observer.stages == [("tokenize", 20)]
    assert list(second.train.examples) == expected
    assert not is_tokenized(rows)


def test_faulty_rows_leave_no_entry(rows, cache):
    rows.write_text(rows.read_text() + '\n{"text": 3}')
    with pytest.raises(DataError, match=r"rows\.jsonl:21"):
        load(rows)
    assert entries() == []
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_full_disk_is_one_error_that_names_the_cache(rows, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache._Writer, "write", full)
    with pytest.raises(QloraError, match="No space left on device") as caught:
        load(rows)
    assert str(cache) in caught.value.where
    assert "QLORA_CACHE" in caught.value.hint
    assert entries() == []


def test_a_cache_that_cannot_be_written_is_not_used(rows, cache):
    cache.write_text("a file in place of the folder")
    loaded, observer = load(rows)
    assert len(loaded.train.examples) == 20
    (note,) = observer.notes
    assert str(cache) in note


def test_a_file_that_changes_while_it_is_read_is_not_kept(rows, monkeypatch):
    tokenizer, data = load_tokenizer("starter"), Data(train=str(rows))

    def changing(*arguments, **options):
        rows.write_text("changed")
        return encode(*arguments, **options)

    from qlora_cli.data.encode import encode

    with pytest.raises(InputError, match="changed while"):
        RowLoader(data, tokenizer, LIMITS, changing).load()
    assert entries() == []


def test_small_files_are_not_kept(rows, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "_MIN_BYTES", 10**6)
    load(rows)
    assert not cache.exists()


def test_mapped_rows_outlive_their_entry(rows, cache):
    loaded, _ = load(rows)
    mapped, _ = load(rows)
    shutil.rmtree(cache)
    assert list(mapped.train.examples) == list(loaded.train.examples)


def load_in_process(path, cache, results):
    import os

    os.environ["QLORA_CACHE"] = str(cache)
    token_cache._MIN_BYTES = 0
    loaded, observer = load(path)
    results.put((len(observer.stages), [example.ids for example in loaded.train.examples]))


@pytest.mark.slow
def test_two_processes_write_one_entry_once(rows, cache):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=load_in_process, args=(rows, cache, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    results.close()
    results.join_thread()
    assert sorted(stages for stages, _ in found) == [0, 1]
    assert found[0][1] == found[1][1]
    assert len(entries()) == 1


def test_the_cache_is_in_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    from qlora_cli.files.cache import cache_root

    monkeypatch.setenv("QLORA_CACHE", "~/x")
    assert cache_root() == Path("~/x").expanduser()
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("~/.cache/qlora").expanduser()
