"""`qlora merge`: write a merged checkpoint of a run, and optionally a GGUF file of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_cli.data.template import trained_template
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.merge.merge_settings import MergeSettings, choose_settings
from qlora_cli.export.merge.merged_tensors import MergedTensors, open_merged_tensors
from qlora_cli.export.merge.write import find_equal_merge, write_merged
from qlora_cli.export.options import AUTO_BASE, DEFAULT_DTYPE
from qlora_cli.files.dtype import dtype_name, torch_dtype
from qlora_cli.jobs.results import MergeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
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
    """Write the merged model of a run.

    run: the run's folder. out: folder to write; it must be new or empty, except that a GGUF file is
        added to a folder that has the same merge without one.
    dtype: name of the output dtype; None for float16, or bfloat16 if the model does not fit the
        range of float16.
    base: "original", "dequantized" or "auto".
    weight: factor of the run's adapter. others: (run or adapter folder, factor) of further adapters
        to add.
    gguf: "f16" or "q8_0" to write a GGUF file as well; None for none.

    Raises UsageError if `out` is in use, the run does not have that base, an adapter was trained on
    another base, or llama.cpp does not support the model. Raises QloraError if the disk is full.
    Raises VerificationFailed if the model does not fit the requested dtype, or if reading the GGUF
    file gives other values than were written.
    """
    is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_used and gguf is None:
        raise _in_use_error(out)
    _check_writable(out)
    source = Run(run)
    _check_base(source.recipe, base)
    if note := source.describe_weights():
        observer.note(note)
    return_freed_memory()
    device = torch.device(inspect_device().kind)
    torch_type = torch_dtype(dtype or DEFAULT_DTYPE)
    tensors = open_merged_tensors(source, "original", torch_type, device, weight, others)
    merged = _existing_merge(out, tensors, base, dtype) if is_used else None
    if gguf is not None:
        merge_bytes = 0 if merged else _num_bytes(tensors)
        _gguf_writer().check_exportable(source.base_folder, gguf, out, merge_bytes)
    reason = "as in the existing merge"
    if merged is None:
        settings = choose_settings(source, tensors, base, dtype, observer)
        merged, reason = settings.tensors, settings.dtype_reason
        _write(source, settings, out, observer)
    if gguf is not None:
        observer.note(f"GGUF file: {_gguf_writer().export_gguf(out, gguf, observer)}")
    return MergeResult(
        out=out,
        dtype=dtype_name(merged.dtype),
        dtype_reason=reason,
        base=merged.base,
        tensors=len(merged.shapes()),
        bytes=_num_bytes(merged),
    )


def _write(source: Run, settings: MergeSettings, out: Path, observer: Observer) -> None:
    """Write the merged tensors and the files that belong to them into `out`."""
    write_merged(
        settings.tensors,
        source.base_folder,
        out,
        _manifest_details(source, settings),
        observer,
        chat_template=trained_template(source.recipe.data, source.base_folder),
    )


def _in_use_error(out: Path) -> UsageError:
    return UsageError(f"{out} is in use", where="--out", hint="name another folder")


def _check_writable(out: Path) -> None:
    """Raise UsageError if the folder `out` cannot be created, before a long computation begins."""
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(
            f"cannot create a folder in {parent}", where="--out", hint="name another folder"
        )


def _existing_merge(
    out: Path, tensors: MergedTensors, base: str, dtype: str | None
) -> MergedTensors:
    """Return the merge in `out`, to add a GGUF file. Raises UsageError if it is a different one."""
    merged = find_equal_merge(out, tensors)
    if (
        merged is None
        or base not in (AUTO_BASE, merged.base)
        or dtype not in (None, dtype_name(merged.dtype))
    ):
        raise _in_use_error(out)
    return merged


def _num_bytes(tensors: MergedTensors) -> int:
    return sum(shape.num_bytes for shape in tensors.shapes().values())


def _gguf_writer() -> ModuleType:
    """Return the module that writes GGUF files. Raises UsageError without the gguf package."""
    if find_spec("gguf") is None:
        raise UsageError(
            "writing GGUF files needs the gguf package, which is not installed",
            where="--gguf",
            hint="pip install 'qlora-cli[gguf]'",
        )
    from qlora_cli.export.gguf import write as gguf_write

    return gguf_write


def _check_base(recipe: Recipe, base: str) -> None:
    """Raise UsageError if the run does not have this base."""
    if base == "dequantized" and recipe.base.bits == 16:
        raise UsageError(
            "the base of this run is not quantized, so there is no dequantized base",
            where="--base",
            hint="omit --base, or use --base original",
        )


def _manifest_details(run: Run, settings: MergeSettings) -> dict[str, Any]:
    """Return the entries of merge.json that describe the merge and do not affect its tensors."""
    return {
        "base_model": run.recipe.model.name,
        "revision": run.recipe.model.revision,
        "method": run.recipe.adapter.method,
        "step": run.trained_step,
        **settings.to_dict(),
    }
