"""A base that is loaded from its packed copy equals the packed checkpoint bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.files import cache
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import Phase
from qlora_cli.models import packed_base
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.packed_base import has_packed_copy, packed_store
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.plan.planner import Planner
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.state import build_state
from tests.helpers.families import MODEL_TYPES, ties_embeddings
from tests.helpers.interrupted import train_run
from tests.helpers.marks import slow_after_first
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows

USED, KEPT = "the packed base of an earlier start is used", "the packed base is kept"
FORMATS = [
    {"bits": 4},
    {"bits": 4, "quant_type": "fp4", "double_quant": False},
    {"bits": 8},
    {"bits": 16, "compute_dtype": "bfloat16"},
    {"bits": 4, "overrides": {"down": 8, "*.0.*": 16}},
]
PROFILE = profile_of(CPU)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


class NoTensors(FolderSource):
    """A checkpoint of which no tensor may be read."""

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} is read from the checkpoint")


def recipe_of(model: Path, **sections: Mapping[str, Any]) -> Recipe:
    rows = model.parent / "rows.jsonl"
    if not rows.is_file():
        make_rows(rows)
    settings = {"cache": True, **sections.pop("base", {})}
    return make_recipe(model, rows, base=settings, **sections)


def request_of(
    recipe: Recipe, observer: Observer, source_class: type[FolderSource] = FolderSource
) -> ModelRequest:
    base = Path(recipe.model.name)
    config = read_config(base / "config.json")

    def source(_: Any, family: Family) -> FolderSource:
        opened = open_source(base, family)
        opened.__class__ = source_class
        return opened

    store = packed_store(recipe, base, config, AutoModelForCausalLM, "cpu", observer)
    return ModelRequest(recipe, config, source, CPU, PROFILE, observer, copy=store)


def tensors_of(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return every tensor of the base, apart from the adapter."""
    state = dict(loaded.model.named_parameters()) | dict(loaded.model.named_buffers())
    return {name: t.detach() for name, t in state.items() if "lora_" not in name}


def assert_equal_bits(first: LoadedModel, second: LoadedModel) -> None:
    left, right = tensors_of(first), tensors_of(second)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, right[name])]
        assert torch.equal(*bits), name


CASES = [(family, number) for family in MODEL_TYPES for number in range(len(FORMATS))]


@pytest.mark.parametrize("case", slow_after_first(CASES), ids=str)
def test_the_copy_has_the_bits_of_packing_again(tmp_path: Path, case: tuple[str, int]) -> None:
    family, number = case
    base = make_base(tmp_path / "base", family, tied=ties_embeddings(family))
    recipe, observer = recipe_of(base, base=FORMATS[number]), NoteRecorder()
    packed = build(request_of(recipe, observer))
    mapped = build(request_of(recipe, observer, NoTensors))
    assert [note[: len(KEPT)] for note in observer.notes[:1]] == [KEPT]
    assert observer.notes[1].startswith(USED)
    assert_equal_bits(packed, mapped)
    without = recipe_of(base, base=FORMATS[number] | {"cache": False})
    assert_equal_bits(build(request_of(without, observer)), mapped)
    assert len(observer.notes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma2"])
def test_the_copy_of_a_derived_family(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    from qlora_cli.proof.small_config import small_config

    config = small_config(AutoConfig.for_model(model_type))
    base = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(base)
    recipe, observer = recipe_of(base), NoteRecorder()
    packed = build(request_of(recipe, observer))
    assert_equal_bits(packed, build(request_of(recipe, observer, NoTensors)))


@pytest.mark.slow
def test_training_from_the_copy_has_the_same_bits(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    files = []
    for name in ("first", "second", "without"):
        recipe = recipe_of(base, base={"cache": name != "without"}, train={"steps": 2})
        recipe = recipe.model_copy(update={"output": str(tmp_path / name)})
        files.append((train_run(recipe).adapter / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def planned_load(recipe: Recipe, config: Any, has_copy: bool) -> Phase:
    return Planner(config, PROFILE, has_copy=lambda _: has_copy).plan(recipe).phases[0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*FORMATS, {"residency": "disk"}], ids=str)
def test_the_plan_of_loading_a_copy_equals_the_run(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = recipe_of(base, base=settings)
    config = read_config(base / "config.json")
    peaks = []
    for has_copy in (False, True):
        assert has_packed_copy(recipe, base, config, AutoModelForCausalLM, "cpu") == has_copy
        planned = planned_load(recipe, config, has_copy)
        clear_scale_codebook(CPU)
        instrument = Instrument(CPU, PROFILE)
        with instrument.phase("load"):
            build_state(request_of(recipe, NoteRecorder()))
        assert planned.name == "load"
        assert planned.peak_bytes == pytest.approx(instrument.phases[0].peak_bytes, rel=0.01)
        peaks.append(planned.peak_bytes)
    assert peaks[1] < peaks[0] or recipe.base.bits == 16


def key_of(recipe: Recipe) -> str:
    store = request_of(recipe, NoteRecorder()).copy
    assert store is not None
    return store.folder.name


def test_whatever_changes_bytes_makes_a_new_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "llama")
    keys = {key_of(recipe_of(base))}

    def is_new(**settings: Any) -> bool:
        before = len(keys)
        keys.add(key_of(recipe_of(base, base=settings)))
        return len(keys) > before

    assert not is_new()
    assert is_new(quant_type="fp4")
    assert is_new(double_quant=False)
    assert is_new(compute_dtype="bfloat16")
    assert is_new(bits=8)
    assert not is_new(bits=8, outlier_threshold=0.0)
    assert is_new(bits=16)
    assert is_new(overrides={"down": 8})
    assert is_new(overrides={"down": 16})
    with monkeypatch.context() as patch:
        patch.setattr(packed_base, "version", lambda name: "0")
        assert is_new()
    with monkeypatch.context() as patch:
        patch.setattr(packed_base, "_code_digest", lambda: "other code")
        assert is_new()
    config = base / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    assert is_new()
    config.write_text(text)
    assert not is_new()
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert is_new()


def test_which_bases_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")

    def is_kept(**sections: Any) -> bool:
        return request_of(recipe_of(base, **sections), NoteRecorder()).copy is not None

    assert is_kept()
    assert not is_kept(base={"cache": False})
    assert not is_kept(base={"cache": "auto"}), "a small base"
    assert not is_kept(base={"bits": 16}, adapter={"method": "full"})
    monkeypatch.setattr(packed_base, "MIN_BYTES", 0)
    assert is_kept(base={"cache": "auto"})
    assert is_kept(base={"cache": "auto", "bits": 8})
    assert not is_kept(base={"cache": "auto", "bits": 16})


def test_a_damaged_copy_is_replaced_while_the_base_is_loaded(tmp_path: Path, folder: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe, observer = recipe_of(base), NoteRecorder()
    packed = build(request_of(recipe, observer))
    (shard,) = folder.glob("*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert_equal_bits(packed, build(request_of(recipe, observer)))
    used, damaged, kept = observer.notes[1:]
    assert used.startswith(USED)
    assert "damaged and is not used" in damaged
    assert kept.startswith(KEPT)
    assert_equal_bits(packed, build(request_of(recipe, observer, NoTensors)))
    assert len(list(folder.glob("*-damaged/*.safetensors"))) == 1


def test_a_tied_head_with_other_values_is_refused_and_not_kept(
    tmp_path: Path, folder: Path
) -> None:
    base = make_base(tmp_path / "base", "llama")
    config = base / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    for _ in range(2):
        with pytest.raises(ModelError, match="ties lm_head"):
            build(request_of(recipe_of(base), NoteRecorder()))
    assert not folder.exists()
