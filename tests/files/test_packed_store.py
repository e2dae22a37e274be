"""Packed bases in the cache: damage, full disks, the limit of their size, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.errors import UsageError
from qlora_cli.files import cache, packed_files
from qlora_cli.files.cache import locked
from qlora_cli.files.packed_store import LIMIT, PackedStore, size_limit
from qlora_cli.files.safetensors_io import TensorSpec, read_header
from qlora_cli.units import MIB, format_bytes
from tests.helpers.observers import NoteRecorder

TENSORS = {
    "a": torch.arange(4096, dtype=torch.uint8).view(-1, 1),
    "odd": torch.arange(7, dtype=torch.int8),
    "a.scale": torch.linspace(-1, 1, 33),
    "scalar": torch.tensor(3.5),
    "half": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.empty(0, 3),
}
SIZE = format_bytes(packed_files.files_bytes(packed_files.specs_of(TENSORS.items())))
SPECS = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed bases in an empty cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def named() -> Iterator[tuple[str, Tensor]]:
    yield from TENSORS.items()


def store_of(key: str = "key") -> tuple[PackedStore, list[str]]:
    observer = NoteRecorder()
    return PackedStore(cache.entry_folder(cache.PACKED, key), "a base", observer), observer.notes


def keep(key: str = "key") -> list[str]:
    """Start as the first process of a base does. Return the notes."""
    store, notes = store_of(key)
    store.read(SPECS)
    store.finish(named)
    return notes


def assert_is_read(key: str = "key") -> None:
    store, notes = store_of(key)
    found = store.read(SPECS)
    assert found is not None, notes
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


def hidden(folder: Path) -> list[str]:
    """Return what unfinished entries left, apart from locks."""
    return [p.name for p in folder.iterdir() if p.name[0] == "." and p.suffix != ".lock"]


def test_a_kept_base_is_read_and_listed(folder: Path) -> None:
    store, notes = store_of()
    assert store.read(SPECS) is None
    assert not store.exists()
    assert keep() == [
        f"the packed base is kept for later starts ({SIZE} in {folder / 'key'}); "
        "base.cache=false keeps none"
    ]
    assert store_of()[0].exists()
    assert_is_read()
    (entry,) = cache.entries()
    assert (entry.kind, entry.description) == (cache.PACKED, "a base")
    assert notes == []
    assert [entry.key for entry in cache.clear()] == ["key"]
    assert store_of()[0].read(SPECS) is None


def test_tensors_are_mapped_and_begin_where_tensors_begin(folder: Path) -> None:
    keep()
    found = store_of()[0].read(SPECS)
    assert found is not None
    assert all(t.data_ptr() % 64 == 0 for t in found.values() if t.numel())
    (shard,) = (folder / "key").glob("*.safetensors")
    before = shard.read_bytes()
    found["a"].zero_()
    assert shard.read_bytes() == before, "a private mapping"
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert shard.name in maps.read_text()


def test_several_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "SHARD_BYTES", 4100)
    keep()
    assert len(list((folder / "key").glob("*.safetensors"))) > 2
    assert_is_read()


def damages(folder: Path) -> dict[str, bytes]:
    """Return damaged contents of a copy's files: the name of the damage -> content."""
    shard = next(folder.glob("*.safetensors"))
    entries, _ = read_header(shard)
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[entries["half"].start] ^= 1
    return {
        "flipped": bytes(flipped),
        "short": content[:-1],
        "empty": b"",
        "header": b"\xff" + content[1:],
    }


@pytest.mark.parametrize("kind", ["flipped", "short", "empty", "header", "entry", "missing"])
def test_a_damaged_copy_is_set_aside_and_written_again(folder: Path, kind: str) -> None:
    keep()
    entry = folder / "key"
    shard = next(entry.glob("*.safetensors"))
    if kind == "missing":
        shard.unlink()
    elif kind == "entry":
        (entry / cache.ENTRY).write_text("{")
    else:
        shard.write_bytes(damages(entry)[kind])
    store, notes = store_of()
    assert store.read(SPECS) is None
    note = notes[-1]
    assert note.startswith("warning: the packed copy of the base is damaged"), note
    assert str(folder / "key-damaged") in note
    store.finish(named)
    assert_is_read()
    listed = {entry.key: entry.description for entry in cache.entries()}
    assert listed["key"] == "a base"
    assert listed["key-damaged"].startswith("damaged (")


def test_a_tensor_of_another_form_is_damage() -> None:
    keep()
    store, notes = store_of()
    assert store.read(SPECS | {"a": TensorSpec(torch.uint8, (4096,))}) is None
    assert "it has no a of this form" in notes[1]


def test_after_damage_nothing_is_read_from_the_copy(folder: Path) -> None:
    keep()
    shard = next((folder / "key").glob("*.safetensors"))
    shard.write_bytes(damages(folder / "key")["flipped"])
    store, notes = store_of()
    assert store.read({"a": SPECS["a"]}) is not None
    assert store.read({"half": SPECS["half"]}) is None
    assert store.read({"a": SPECS["a"]}) is None
    assert len(notes) == 2


def test_the_least_recently_used_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, key in enumerate("abc"):
        keep(key)
        file = cache.entry_folder(cache.PACKED, key) / cache.ENTRY
        os.utime(file, (1000 + number, 1000 + number))
    store_of("a")[0].read(SPECS)  # Now b is the least recently used.
    size = packed_files.files_bytes(packed_files.specs_of(named()))
    monkeypatch.setenv(LIMIT, str(3 * size))
    notes = keep("d")
    assert "removed the 1 least recently used packed base" in notes[0]
    assert LIMIT in notes[0]
    assert [entry.key for entry in cache.entries()] == ["a", "c", "d"]
    monkeypatch.setenv(LIMIT, str(size))
    assert "removed the 3 least recently used packed bases" in keep("e")[0]
    assert [entry.key for entry in cache.entries()] == ["e"]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_files_stay_within_the_limit(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("0")
    limit = number * int(1.2 * cache.entries()[0].bytes)
    monkeypatch.setenv(LIMIT, str(limit))
    for key in "123456":
        keep(key)
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= limit
    assert len(cache.entries()) >= number


@pytest.mark.parametrize("limit", ["0", "1KiB"])
def test_a_base_larger_than_the_limit_is_not_kept(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, limit)
    (note,) = keep()
    assert f"is not kept for later starts: it needs {SIZE}, and {LIMIT} is" in note
    assert cache.entries() == []


def test_a_limit_that_is_not_a_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(UsageError, match="not a size") as error:
        store_of()
    assert LIMIT in str(error.value)
    monkeypatch.setenv(LIMIT, "2MiB")
    assert size_limit() == 2 * MIB


def test_a_full_disk_is_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open

    def open_(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        full = path.suffix == ".safetensors" and mode[0] == "w"
        return real_open(Path("/dev/full") if full else path, mode, *rest, **named)  # type: ignore[call-overload]

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        assert keep() == ["the packed base is not kept for later starts: No space left on device"]
    assert cache.entries() == []
    assert hidden(folder) == []


def test_too_little_space_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    (note,) = keep()
    assert f"not kept for later starts: it needs {SIZE} on disk, and 1000 B are free" in note


def test_a_cache_that_is_a_file_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    (note,) = keep()
    assert note.startswith("the packed base is not kept for later starts: ")


def test_a_read_only_cache_is_a_note(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    try:
        if os.access(tmp_path / "cache", os.W_OK):
            pytest.skip("this user may write to every folder")
        (note,) = keep()
    finally:
        (tmp_path / "cache").chmod(0o700)
    assert note.startswith("the packed base is not kept for later starts: ")


def test_an_entry_that_another_process_writes_is_left_alone(folder: Path) -> None:
    with locked(folder / "key"):
        assert keep() == [
            "the packed base is not kept for later starts: another process writes one now"
        ]
    assert cache.entries() == []


def test_an_entry_that_another_process_has_written_is_not_written_again(folder: Path) -> None:
    store, notes = store_of()
    store.read(SPECS)
    keep()
    before = (folder / "key" / cache.ENTRY).stat().st_ino
    store.finish(named)
    assert notes == []
    assert (folder / "key" / cache.ENTRY).stat().st_ino == before


WRITE = """
import sys, time, torch
from pathlib import Path
from qlora_cli.events import Silent
from qlora_cli.files import cache, packed_files
from qlora_cli.files.packed_store import PackedStore
packed_files.SHARD_BYTES = 2**20
store = PackedStore(cache.entry_folder(cache.PACKED, "key"), "a base", Silent())
def tensors():
    for number in range(40):
        yield str(number), torch.full((2**20,), number, dtype=torch.uint8)
print("ready", flush=True)
sys.stdin.readline()
store.finish(tensors)
"""
LARGE = {str(number): TensorSpec(torch.uint8, (2**20,)) for number in range(40)}


def start_writers(number: int) -> list[subprocess.Popen[str]]:
    """Start processes that write the same copy at the same time."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(number)
    ]
    for writer in writers:
        assert writer.stdout is not None
        with writer.stdout as stream:
            assert stream.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        with writer.stdin as stream:
            stream.write("go\n")
    return writers


def assert_large_is_complete() -> None:
    found = store_of()[0].read(LARGE)
    assert found is not None
    assert all(bool((tensor == int(name)).all()) for name, tensor in found.items())


@pytest.mark.slow
def test_two_processes_that_write_at_once(folder: Path) -> None:
    assert [writer.wait(timeout=60) for writer in start_writers(2)] == [0, 0]
    assert_large_is_complete()
    assert hidden(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [0, 20])
def test_a_killed_writer_leaves_no_broken_entry(folder: Path, num_shards: int) -> None:
    (writer,) = start_writers(1)
    while len(list(folder.glob(".key.*.partial/*.safetensors"))) <= num_shards:
        assert writer.poll() is None, "the writer has ended before it was killed"
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=60)
    assert store_of()[0].read(LARGE) is None
    assert cache.entries() == []
    assert hidden(folder)
    keep()
    assert_is_read()
    assert hidden(folder) == []
