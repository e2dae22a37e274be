"""`qlora merge`: from a run to a merged checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.checkpoint.open import base_folder, read_recipe
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.decide import PREFERRED, Decision, decide
from qlora_cli.export.merge import write_merged
from qlora_cli.export.room import give_back_freed
from qlora_cli.export.tensors import merged_tensors
from qlora_cli.jobs.results import MergeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.schema import Recipe
from qlora_cli.weights.build import torch_dtype


def run(
    run: Path,
    *,
    out: Path,
    dtype: str | None,
    base: str,
    observer: Observer,
    weight: float = 1.0,
    others: Sequence[tuple[Path, float]] = (),
    gguf: str | None = None,
) -> MergeResult:
    """Writes the merged model of a run.

    dtype: None for float16, or bfloat16 where that does not hold the model. base: original |
    dequantized | auto. weight: of the run's adapter. others: runs or adapters in PEFT's format to
    add to it, and their weights. gguf: f16 | q8_0, to write such a file of it too. Raises
    UsageError where `out` is in use, the run has no such base, an adapter is of another base or
    llama.cpp has no such model; QloraError where the disk is full; VerificationFailed where the
    dtype asked for does not hold the model or the GGUF file is not read back as it should be.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is in use", where="--out", hint="name another folder")
    folder = RunFolder(run)
    recipe = read_recipe(folder)
    _check_base(recipe, base)
    give_back_freed()
    device = torch.device(inspect_device().kind)
    wanted = torch_dtype(dtype) if dtype else PREFERRED
    tensors = merged_tensors(folder, "original", wanted, device, weight, others)
    if gguf is not None:
        merged_bytes = sum(shape.num_bytes for shape in tensors.shapes().values())
        _exporter().check_exportable(base_folder(folder), gguf, out, merged_bytes)
    decision = decide(folder, tensors, base, dtype is not None, observer)
    about = _about(recipe, decision)
    written = write_merged(decision.tensors, base_folder(folder), out, about, observer)
    if gguf is not None:
        observer.note(f"GGUF file: {_exporter().export_gguf(out, gguf, observer)}")
    return MergeResult(
        out=out,
        dtype=str(decision.tensors.dtype).removeprefix("torch."),
        dtype_reason=decision.dtype_reason,
        base=decision.tensors.base,
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


def _about(recipe: Recipe, decision: Decision) -> dict[str, Any]:
    """What merge.json says besides the settings that decide the bytes."""
    return {
        "base_model": recipe.model.name,
        "revision": recipe.model.revision,
        "method": recipe.adapter.method,
        **decision.to_dict(),
    }
