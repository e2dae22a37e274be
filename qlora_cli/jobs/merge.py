"""`qlora merge`: from a run to a merged checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.merge.merge_settings import MergeSettings, choose_settings
from qlora_cli.export.merge.merged_tensors import MergedTensors, open_merged_tensors
from qlora_cli.export.merge.write import find_equal_merge, write_merged
from qlora_cli.export.options import AUTO_BASE, DEFAULT_DTYPE
from qlora_cli.files.dtype import dtype_name, torch_dtype
from qlora_cli.jobs.results import MergeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import give_back_freed
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run


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
    add to it, and their weights. gguf: f16 | q8_0, to write such a file of it too, also where `out`
    is the same merge without one.

    Raises UsageError where `out` is in use, the run has no such base, an adapter is of another base
    or llama.cpp has no such model; QloraError where the disk is full; VerificationFailed where the
    dtype asked for does not hold the model or the GGUF file is not read back as it should be.
    """
    in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if in_use and gguf is None:
        raise _in_use(out)
    _check_place(out)
    source = Run(run)
    _check_base(source.recipe, base)
    give_back_freed()
    device = torch.device(inspect_device().kind)
    wanted = torch_dtype(dtype or DEFAULT_DTYPE)
    tensors = open_merged_tensors(source, "original", wanted, device, weight, others)
    merged = _merged_before(out, tensors, base, dtype) if in_use else None
    if gguf is not None:
        more_bytes = 0 if merged else _num_bytes(tensors)
        _exporter().check_exportable(source.base_folder, gguf, out, more_bytes)
    reason = "merged before"
    if merged is None:
        decision = choose_settings(source, tensors, base, dtype, observer)
        merged, reason = decision.tensors, decision.dtype_reason
        write_merged(merged, source.base_folder, out, _about(source.recipe, decision), observer)
    if gguf is not None:
        observer.note(f"GGUF file: {_exporter().export_gguf(out, gguf, observer)}")
    return MergeResult(
        out=out,
        dtype=dtype_name(merged.dtype),
        dtype_reason=reason,
        base=merged.base,
        tensors=len(merged.shapes()),
        bytes=_num_bytes(merged),
    )


def _in_use(out: Path) -> UsageError:
    return UsageError(f"{out} is in use", where="--out", hint="name another folder")


def _check_place(out: Path) -> None:
    """Before anything is judged: can a folder be made there?"""
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(
            f"no folder can be made in {there}", where="--out", hint="name another folder"
        )


def _merged_before(
    out: Path, tensors: MergedTensors, base: str, dtype: str | None
) -> MergedTensors:
    """The same merge, which lacks its GGUF file. Raises UsageError where `out` is another one."""
    merged = find_equal_merge(out, tensors)
    if (
        merged is None
        or base not in (AUTO_BASE, merged.base)
        or dtype not in (None, dtype_name(merged.dtype))
    ):
        raise _in_use(out)
    return merged


def _num_bytes(tensors: MergedTensors) -> int:
    return sum(shape.num_bytes for shape in tensors.shapes().values())


def _exporter() -> ModuleType:
    """What writes GGUF files. Raises UsageError where the package that it needs is absent."""
    if find_spec("gguf") is None:
        raise UsageError(
            "GGUF files need the gguf package, which is not installed",
            where="--gguf",
            hint="pip install 'qlora-cli[gguf]'",
        )
    from qlora_cli.export.gguf import write as gguf_write

    return gguf_write


def _check_base(recipe: Recipe, base: str) -> None:
    if base == "dequantized" and recipe.base.bits == 16:
        raise UsageError(
            "this run's base was not quantized, so there is no dequantized one",
            where="--base",
            hint="leave --base out or use original",
        )


def _about(recipe: Recipe, decision: MergeSettings) -> dict[str, Any]:
    """What merge.json says besides the settings that decide the bytes."""
    return {
        "base_model": recipe.model.name,
        "revision": recipe.model.revision,
        "method": recipe.adapter.method,
        **decision.to_dict(),
    }
