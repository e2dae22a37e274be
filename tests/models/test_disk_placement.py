"""A base on disk: equal bits, nothing in memory, and what happens without a usable copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.data.collate import collate
from qlora_cli.errors import QloraError
from qlora_cli.files import cache, packed_files, packed_store, safetensors_io
from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.files.locate import read_config
from qlora_cli.files.safetensors_io import TensorSpec, bytes_of
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.models import packed_base
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn import host_head
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import MODEL_TYPES, ties_embeddings
from tests.helpers.marks import slow_after_first
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, randomize_b
from tests.helpers.training import ROWS

NUM_BLOCKS = 4
DEPTH = {"gpt2": "n_layer"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded_from(
    folder: Path, family: str, residency: str, number: int = NUM_BLOCKS, **base: Any
) -> tuple[LoadedModel, NoteRecorder]:
    """Return a model of 4 blocks, of which the first `number` are recomputed, and the notes."""
    model, observer = folder / family, NoteRecorder()
    if not model.exists():
        depth = {DEPTH.get(family, "num_hidden_layers"): NUM_BLOCKS}
        make_base(model, family, spread=0.15, tied=ties_embeddings(family), **depth)
    settings = {"residency": residency, "cache": residency == "disk" or "auto", **base}
    train = {"activation_checkpointing": number}
    rows = make_rows(folder / "rows.jsonl")
    recipe, config = (
        make_recipe(model, rows, base=settings, train=train),
        read_config(model / "config.json"),
    )
    copy = packed_base.packed_store(recipe, model, config, AutoModelForCausalLM, "cpu", observer)
    request = ModelRequest(
        recipe,
        config,
        lambda _, found: open_source(model, found),
        CPU,
        profile_of(CPU),
        observer,
        copy=copy,
    )
    loaded = build(request)
    randomize_b(loaded)
    return loaded, observer


def results(loaded: LoadedModel) -> list[Tensor]:
    """Return the loss, every gradient, and the logits of a row."""
    loss = CAUSAL.loss(loaded, collate(ROWS[:3]), CPU, 1.0)
    loss.backward()
    grads = [p.grad for p in loaded.trainable().values() if p.grad is not None]
    with torch.inference_mode():
        logits: Tensor = loaded.model(torch.tensor([[3, 7, 7, 30]])).logits
    return [loss.detach(), *grads, logits]


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(own, other) for own, other in zip(first, second, strict=True))


def packed_bytes_in_memory(loaded: LoadedModel) -> int:
    linears = [m for m in loaded.model.modules() if isinstance(m, QuantLinear)]
    return sum(linear.weight.nbytes for linear in linears if not linear.weight.is_meta)


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_the_disk_gives_equal_bits(tmp_path: Path, family: str) -> None:
    """On the first start, which packs the base, and on later ones; also with a copy of another."""
    wanted = results(loaded_from(tmp_path, family, "device")[0])
    for number in (NUM_BLOCKS, NUM_BLOCKS, 2, 0):
        loaded, observer = loaded_from(tmp_path, family, "disk", number)
        assert packed_bytes_in_memory(loaded) == 0 or number < NUM_BLOCKS
        assert_equal(results(loaded), wanted)
    assert "the packed base of an earlier start is used" in observer.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", [{"bits": 8}, {"bits": 16}, {"overrides": {"down": 8, "*.1.*": 16}}], ids=str
)
def test_the_disk_gives_equal_bits_in_every_format(tmp_path: Path, base: dict[str, Any]) -> None:
    wanted = results(loaded_from(tmp_path, "llama", "device", 3, **base)[0])
    assert_equal(results(loaded_from(tmp_path, "llama", "disk", 3, **base)[0]), wanted)


def test_the_head_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_head, "PIECE_BYTES", 4096)
    wanted = results(loaded_from(tmp_path, "llama", "host")[0])
    assert_equal(results(loaded_from(tmp_path, "llama", "disk")[0]), wanted)


def test_no_file_of_the_copy_is_mapped(tmp_path: Path, own_cache: Path) -> None:
    for _ in range(2):
        loaded, _ = loaded_from(tmp_path, "llama", "disk")
        results(loaded)
        assert str(own_cache) not in Path("/proc/self/maps").read_text()


def test_packing_holds_one_tensor_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is written before the next one is read, in several files."""
    monkeypatch.setattr(packed_files, "SHARD_BYTES", 40_000)
    events: list[str] = []
    read, write = FolderSource.read, safetensors_io._write_tensor

    def note_read(self: FolderSource, name: str) -> Tensor:
        events.append(name)
        return read(self, name)

    def note_write(stream: Any, name: str, *given: Any) -> None:
        events.append(f"{name} is written")
        write(stream, name, *given)

    monkeypatch.setattr(FolderSource, "read", note_read)
    monkeypatch.setattr(safetensors_io, "_write_tensor", note_write)
    loaded_from(tmp_path, "llama", "disk")
    reads = [at for at, name in enumerate(events) if not name.endswith("is written")]
    assert len(reads) > NUM_BLOCKS * 7
    assert all(events[at + 1] == f"{events[at]} is written" for at in reads)
    (entry,) = cache.entries()
    assert len(list(cache.entry_folder(entry.kind, entry.key).glob("*.safetensors"))) > 3


def test_without_a_copy_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="residency: disk reads the base from its packed"):
        loaded_from(tmp_path, "llama", "disk", cache=False)
    monkeypatch.setenv(packed_store.LIMIT, "1KiB")
    with pytest.raises(QloraError, match="cannot be kept: it needs") as caught:
        loaded_from(tmp_path, "llama", "disk")
    assert caught.value.where == "base.residency"


def test_a_damaged_copy_is_packed_again(tmp_path: Path) -> None:
    wanted = results(loaded_from(tmp_path, "llama", "disk")[0])
    (entry,) = cache.entries()
    file = sorted(cache.entry_folder(entry.kind, entry.key).glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    loaded, observer = loaded_from(tmp_path, "llama", "disk")
    assert "the packed copy of the base is damaged" in observer.notes[1]
    assert_equal(results(loaded), wanted)


def test_rows_of_a_tensor_on_disk(tmp_path: Path) -> None:
    table = torch.arange(60, dtype=torch.float16).view(20, 3)
    file = tmp_path / "table.safetensors"
    safetensors_io.write_tensors(
        file, {"a": TensorSpec(torch.float16, (20, 3))}, lambda _: table, {}
    )
    entry = packed_files.read_header(file)[0]["a"]
    on_disk = DiskTensor(entry, packed_files.OpenFile(file))
    file.unlink()
    ids = torch.tensor([19, 0, 0, 7])
    assert torch.equal(on_disk.read_rows(ids), table[ids])
    assert on_disk.read_rows(ids[:0]).shape == (0, 3)
    part = torch.empty(4, 3, dtype=torch.float16)
    on_disk.read_into(part, 5)
    assert torch.equal(part, table[5:9])
    for wrong in (-1, 20):
        with pytest.raises(IndexError):
            on_disk.read_rows(torch.tensor([wrong]))
    with pytest.raises(QloraError, match="shorter than its header states"):
        on_disk.read_into(part, 18)
    assert len(bytes_of(part)) == 24
