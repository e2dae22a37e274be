"""`qlora merge`: from a run to a merged checkpoint."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.checkpoint.open import base_folder, read_recipe
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.choose import Judgement, choose_base
from qlora_cli.export.merge import write_merged
from qlora_cli.export.tensors import MergedTensors, merged_tensors
from qlora_cli.jobs.results import MergeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.schema import Recipe
from qlora_cli.weights.build import torch_dtype

DTYPE = "float16"
"""Of the merged weights, where nothing else is asked for."""


def run(
    run: Path,
    *,
    out: Path,
    dtype: str | None,
    base: str,
    observer: Observer,
    gguf: str | None = None,
) -> MergeResult:
    """Writes the merged model of a run.

    base: original | dequantized | auto. gguf: f16 | q8_0, to write such a file of it too. Raises
    UsageError where `out` is in use, the run has no such base or llama.cpp no such model;
    QloraError where a value does not fit the dtype or the disk is full; VerificationFailed where
    the GGUF file is not read back as it should be.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is in use", where="--out", hint="name another folder")
    folder = RunFolder(run)
    recipe = read_recipe(folder)
    _check_base(recipe, base)
    wanted = torch_dtype(dtype or DTYPE)
    device = torch.device(inspect_device().kind)
    tensors = merged_tensors(folder, "original", wanted, device)
    if gguf is not None:
        merged_bytes = sum(shape.num_bytes for shape in tensors.shapes().values())
        _exporter().check_exportable(base_folder(folder), gguf, out, merged_bytes)
    judgement = _choose(folder, tensors, base, observer)
    tensors = replace(tensors, base=judgement.base)
    about = _about(recipe, judgement)
    written = write_merged(tensors, base_folder(folder), out, about, observer)
    if gguf is not None:
        observer.note(f"GGUF file: {_exporter().export_gguf(out, gguf, observer)}")
    return MergeResult(
        out=out,
        dtype=dtype or DTYPE,
        base=judgement.base,
        tensors=written.num_tensors,
        bytes=written.num_bytes,
    )


def _exporter() -> ModuleType:
    """What writes GGUF files. Raises UsageError where the package that it needs is absent."""
    if find_spec("gguf") is None:
        raise UsageError(
            "GGUF files need the gguf package, which is not installed",
            where="--gguf",
            hint="pip install 'qlora-cli[gguf]'",
        )
    from qlora_cli.export import gguf

    return gguf


def _check_base(recipe: Recipe, base: str) -> None:
    if base == "dequantized" and recipe.base.bits == 16:
        raise UsageError(
            "this run's base was not quantized, so there is no dequantized one",
            where="--base",
            hint="leave --base out or use original",
        )


def _choose(folder: RunFolder, tensors: MergedTensors, base: str, observer: Observer) -> Judgement:
    if base in ("original", "dequantized"):
        return Judgement(base, "asked for")  # type: ignore[arg-type]
    judgement = choose_base(folder, tensors, observer)
    for line in judgement.lines():
        observer.note(line)
    return judgement


def _about(recipe: Recipe, judgement: Judgement) -> dict[str, Any]:
    """What merge.json says besides the settings that decide the bytes."""
    return {
        "base_model": recipe.model.name,
        "revision": recipe.model.revision,
        "method": recipe.adapter.method,
        "judgement": judgement.to_dict(),
    }
