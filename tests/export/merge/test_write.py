"""A merged checkpoint is W + scaling B A, rounded once, and everything else is the base's."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.errors import QloraError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge import write as writing
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.options import MergeBase
from qlora_cli.files.atomic import atomic_folder, make_partial_folder, partial_folders
from qlora_cli.jobs import merge as job
from qlora_cli.models.model import LoadedModel
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import write_parameters
from qlora_cli.runs.run import Run
from tests.helpers.families import MODEL_TYPES, as_in_file
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, make_run

torch.set_num_threads(1)


def a_run(
    folder: Path, family: str, *, spread: float = 0.02, tied: bool = False, **sections: Any
) -> tuple[Path, RunFolder, LoadedModel]:
    base = make_base(folder / "base", family, tied=tied)
    recipe = make_recipe(base, make_rows(folder / "rows.jsonl"), **sections)
    run, loaded = make_run(folder / "run", recipe, spread=spread)
    return base, run, loaded


def tensors_of(
    run: RunFolder, kind: MergeBase, dtype: torch.dtype = torch.float16
) -> MergedTensors:
    return open_merged_tensors(Run(run.path), kind, dtype, CPU)


def read_all(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("targets", ["all", ["q", "v"]], ids=["all", "qv"])
def test_merged_is_the_base_plus_the_scaled_product(
    family: str, bits: int, targets: str | list[str], tmp_path: Path
) -> None:
    base, run, loaded = a_run(
        tmp_path, family, base={"bits": bits}, adapter={"targets": targets, "rslora": True}
    )
    original = read_all(base)
    layers: dict[str, LoraLinear] = dict(adapted_layers(loaded.model))
    kinds: tuple[MergeBase, ...] = ("original", "dequantized") if bits < 16 else ("original",)
    for kind in kinds:
        tensors = tensors_of(run, kind)
        for path, layer in layers.items():
            own = original[f"{path}.weight"].float()
            weight = own if kind == "original" else as_in_file(family, layer.base.dequantize())
            expected = weight.float() + as_in_file(family, layer.delta())
            made = tensors.compute(f"{path}.weight")
            # Half a unit in the last place of float16, plus the error of float32.
            assert (made.float() - expected).abs().le(expected.abs() * 2.0**-11 + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_with_b_zero_the_merge_is_the_base_bit_for_bit(family: str, tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, family, spread=0.0)
    job.run(run.path, out=tmp_path / "out", dtype="float16", base="original", observer=Silent())
    merged, original = read_all(tmp_path / "out"), read_all(base)
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[name], original[name]) for name in original)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_only_what_was_quantized_is_dequantized(family: str, tmp_path: Path) -> None:
    base, run, loaded = a_run(tmp_path, family, adapter={"targets": ["q"]})
    original, tensors = read_all(base), tensors_of(run, "dequantized")
    packed = {f"{site.path}.weight" for site in loaded.sites}
    assert packed < original.keys()
    for name, own in original.items():
        made = tensors.compute(name)
        if name not in packed:
            assert torch.equal(made, own), name
        elif name not in tensors.adapted_names():
            weight_format: Any = loaded.model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(made, as_in_file(family, weight_format.dequantize()).half()), name


def test_what_is_written_in_another_dtype_is_cast_once(tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    for dtype in (torch.bfloat16, torch.float32):
        tensors = tensors_of(run, "original", dtype)
        norm = tensors.compute("model.norm.weight")
        assert norm.dtype == dtype
        assert torch.equal(norm, read_all(base)["model.norm.weight"].to(dtype))


def test_a_sum_between_two_roundings_is_accepted_and_a_flipped_bit_is_not(tmp_path: Path) -> None:
    _, run, _ = a_run(tmp_path, "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    for dtype, bits in ((torch.float16, torch.int16), (torch.float32, torch.int32)):
        tensors = tensors_of(run, "dequantized", dtype)
        made = tensors.compute(name)
        assert tensors.within_rounding_error(name, made)
        made.view(bits)[3, 5] ^= 1
        assert not tensors.within_rounding_error(name, made)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_transformers_loads_the_merge_with_nothing_missing(
    family: str, tied: bool, tmp_path: Path
) -> None:
    base, run, _ = a_run(tmp_path, family, tied=tied)
    tensors = tensors_of(run, "original", torch.bfloat16)
    write_merged(tensors, base, tmp_path / "out", {}, Silent(), max_shard_bytes=50_000)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = read_all(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys() == read_all(base).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_config_and_tokenizer_are_the_bases(tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    (base / "README.md").write_text("about another model")
    (base / "LICENSE").write_text("terms")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    out = tmp_path / "out"
    job.run(run.path, out=out, dtype="bfloat16", base="original", observer=Silent())
    merged = json.loads((out / "config.json").read_text())
    assert merged.pop("dtype") == "bfloat16"
    assert merged == {key: value for key, value in config.items() if key != "torch_dtype"}
    copied = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    own = {"model.safetensors", "config.json", "merge.json"}
    same = copied - {Path(name) for name in own}
    assert {str(path) for path in same} == {
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((out / path).read_bytes() == (base / path).read_bytes() for path in same)


def test_the_files_own_names_are_kept_and_buffers_left_out(tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, "gpt2", tied=True)
    short = {name.removeprefix("transformer."): t for name, t in read_all(base).items()}
    assert "h.0.attn.c_attn.weight" in short
    save_file(
        {**short, "h.0.attn.bias": torch.ones(1, 1, 4, 4)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert tensors_of(run, "original").shapes().keys() == short.keys()


def test_a_base_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    weights = read_all(base)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QloraError, match=r"model\.norm\.weight of the base has values that are not finite"
    ):
        job.run(run.path, out=tmp_path / "out", dtype=None, base="original", observer=Silent())


class Interrupting(Silent):
    """Stops a merge after `after` tensors, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def advance(self, done: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


def counting(tensors: MergedTensors, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compute = MergedTensors.compute

    def counted(self: MergedTensors, name: str) -> Tensor:
        made.append(name)
        return compute(self, name)

    monkeypatch.setattr(MergedTensors, "compute", counted)


def test_a_killed_merge_resumes_after_its_last_complete_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    tensors, out = tensors_of(run, "original"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_merged(tensors, base, out, {}, Interrupting(12), max_shard_bytes=50_000)
    (partial,) = partial_folders(out)
    shard = min(partial.glob("*.safetensors")).name
    half = partial / f".{shard}.0123456789abcdef.partial"
    half.write_text("left by a process that was killed")
    complete = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(complete) >= 2
    assert not out.exists()
    made: list[str] = []
    counting(tensors, made, monkeypatch)
    write_merged(tensors, base, out, {}, Silent(), max_shard_bytes=50_000)
    assert 0 < len(made) < len(tensors.shapes())
    assert not (out / half.name).exists()
    assert all((out / name).stat().st_mtime_ns == then for name, then in complete.items())
    assert not partial.exists()
    write_merged(tensors, base, tmp_path / "fresh", {}, Silent(), max_shard_bytes=50_000)
    for file in (tmp_path / "fresh").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_the_partial_folder_of_another_merge_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    tensors, out = tensors_of(run, "original"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_merged(tensors, base, out, {}, Interrupting(12), max_shard_bytes=50_000)
    made: list[str] = []
    counting(tensors, made, monkeypatch)
    other = replace(tensors, base="dequantized")
    write_merged(other, base, out, {}, Silent(), max_shard_bytes=50_000)
    assert len(made) == len(tensors.shapes())


def test_a_full_disk_is_a_clear_error_and_the_next_merge_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    tensors, out = tensors_of(run, "original"), tmp_path / "out"
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QloraError, match="could not be written: No space left on device"):
        write_merged(tensors, base, out, {}, Silent(), max_shard_bytes=50_000)
    assert not out.exists()
    write_merged(tensors, base, out, {}, Silent(), max_shard_bytes=50_000)
    assert read_all(out).keys() == read_all(base).keys()


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: free)
    with pytest.raises(QloraError, match=r"needs \d+ KiB on disk, and 97.7 KiB are free"):
        write_merged(tensors_of(run, "original"), base, tmp_path / "out", {}, Silent())
    assert not list(tmp_path.rglob("out*/*.safetensors"))


def test_a_partial_folder_with_a_damaged_manifest_is_removed(tmp_path: Path) -> None:
    base, run, _ = a_run(tmp_path, "llama")
    partial = make_partial_folder(tmp_path / "out")
    (partial / "merge.json").write_text("")
    write_merged(tensors_of(run, "original"), base, tmp_path / "out", {}, Silent())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not partial.exists()


def test_a_folder_inside_a_file_is_refused(tmp_path: Path) -> None:
    _, run, _ = a_run(tmp_path, "llama")
    out = run.run_json / "out"
    with pytest.raises(UsageError, match="cannot create a folder in"):
        job.run(run.path, out=out, dtype=None, base="auto", observer=Silent())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_that_is_not_finite_is_named(tmp_path: Path, dtype: str) -> None:
    _, run, _ = a_run(tmp_path, "llama")
    file = run.adapter / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    factors = load_file(file)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, file, metadata=header)
    with pytest.raises(QloraError, match=r"adapter's A or B for .* has values that are not finite"):
        job.run(run.path, out=tmp_path / "out", dtype=dtype, base="original", observer=Silent())


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    _, run, _ = a_run(tmp_path, "llama")
    out = tmp_path / "out"
    out.mkdir()
    job.run(run.path, out=out, dtype=None, base="original", observer=Silent())
    with pytest.raises(UsageError, match="is in use"):
        job.run(run.path, out=out, dtype=None, base="original", observer=Silent())


def test_a_base_that_was_not_quantized_has_no_dequantized_one(tmp_path: Path) -> None:
    _, run, _ = a_run(tmp_path, "llama", base={"bits": 16})
    with pytest.raises(UsageError, match="not quantized"):
        job.run(run.path, out=tmp_path / "out", dtype=None, base="dequantized", observer=Silent())


def test_full_fine_tuning_writes_the_trained_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", tied=True)
    recipe = make_recipe(
        base, make_rows(tmp_path / "rows.jsonl"), base={"bits": 16}, adapter={"method": "full"}
    )
    loaded = build_base(recipe)
    with torch.no_grad():
        for parameter in loaded.trainable().values():
            parameter += 0.01
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write(
        {"recipe": recipe.model_dump(mode="json"), "base_folder": str(base), "status": "done"}
    )
    with atomic_folder(run.weights) as folder:
        write_parameters(loaded.trainable(), folder / "model.safetensors")
    result = job.run(run.path, out=tmp_path / "out", dtype=None, base="auto", observer=Silent())
    assert result.base == "original"
    found = read_all(tmp_path / "out")
    trained = loaded.trainable()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name].half()) for name in found)
