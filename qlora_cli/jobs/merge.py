"""`qlora merge`: write a merged checkpoint of a run, and optionally a GGUF file of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_cli.adapters.peft_prefix import FOLDER
from qlora_cli.data.template import trained_template
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.merge.base_choice import is_stored_quantized
from qlora_cli.export.merge.merge_settings import MergeSettings, choose_settings
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import find_equal_merge, write_merged
from qlora_cli.export.options import AUTO_BASE, DEFAULT_DTYPE
from qlora_cli.files.dtype import dtype_name, torch_dtype
from qlora_cli.jobs.prompt_format import trained_format
from qlora_cli.jobs.results import MergeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.runs.run import Run
from qlora_cli.tasks.classification import CLASSIFICATION


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

    run: the run's folder. out: a new or empty folder; a GGUF file may be added to the same merge.
    dtype: of the output; None for float16, or bfloat16 if a value is too large for float16.
    base: "original", "dequantized" or "auto". weight: factor of the run's adapter.
    others: (run or adapter folder, factor) of further adapters to add.
    gguf: type of a GGUF file to write as well; None for none.

    Raises UsageError if `out` is in use, the run does not have that base, an adapter was trained on
    another base, or llama.cpp does not support the model; QloraError if the disk is full;
    VerificationFailed if a value does not fit the dtype, or the GGUF file has other values.
    """
    is_used = _check_out(out, may_be_used=gguf is not None)
    source = _open_run(run, base, observer)
    if gguf is not None and source.recipe.task == CLASSIFICATION.name:
        raise UsageError(
            "a classifier cannot be written as a GGUF file", where="--gguf", hint="omit --gguf"
        )
    if gguf is not None and source.recipe.adapter.prefix:
        raise UsageError(
            "a prefix (adapter.prefix) cannot be written to a GGUF file",
            where="--gguf",
            hint="omit --gguf, or train without a prefix",
        )
    device = torch.device(inspect_device().kind)
    torch_type = torch_dtype(dtype or DEFAULT_DTYPE)
    tensors = open_merged_tensors(source, "original", torch_type, device, weight, others, observer)
    merged = _existing_merge(out, tensors, base, dtype) if is_used else None
    if gguf is not None:
        merge_bytes = 0 if merged else _num_bytes(tensors)
        _gguf_writer().check_exportable(source.base_folder, gguf, out, merge_bytes)
    reason = "as in the existing merge"
    if merged is None:
        settings = choose_settings(source, tensors, base, dtype, observer)
        merged, reason = settings.tensors, settings.dtype_reason
        _write(source, settings, out, observer)
    if merged.prefix is not None:
        observer.note(
            f"the prefix (adapter.prefix) cannot be merged into weights: it is {out / FOLDER}, "
            "which this package uses with the merged model, and PEFT loads; other programs give "
            "the model without the prefix"
        )
    if gguf is not None:
        observer.note(f"GGUF file: {_gguf_writer().export_gguf(out, gguf, observer)}")
    return _result(out, merged, reason)


def _open_run(path: Path, base: str, observer: Observer) -> Run:
    """Return the run to merge, and report whose step's weights it uses.

    Raises UsageError if the run does not have the base that `--base` names.
    """
    run = Run(path)
    _check_base(run, base)
    if note := run.describe_weights():
        observer.note(note)
    return_freed_memory()
    return run


def _result(out: Path, merged: MergedTensors, dtype_reason: str) -> MergeResult:
    return MergeResult(
        out=out,
        dtype=dtype_name(merged.dtype),
        dtype_reason=dtype_reason,
        base=merged.base,
        tensors=len(merged.shapes()),
        bytes=_num_bytes(merged),
    )


def _check_out(out: Path, *, may_be_used: bool) -> bool:
    """Return whether `out` contains something, before a long computation begins.

    Raises UsageError if it does and may not, or if the folder cannot be created.
    """
    is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_used and not may_be_used:
        raise _in_use_error(out)
    _check_writable(out)
    return is_used


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
    """Raise UsageError if the folder `out` cannot be created."""
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


def _check_base(run: Run, base: str) -> None:
    """Raise UsageError if the run does not have this base."""
    is_quantized = min(run.recipe.base.all_bits) < 16
    if base == "original" and is_quantized and is_stored_quantized(run.base_folder):
        raise UsageError(
            "this base has no original weights: its checkpoint was quantized by bitsandbytes",
            where="--base",
            hint="omit --base, or use --base dequantized, which are the weights of the training",
        )
    if base == "dequantized" and not is_quantized:
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
        "data_format": trained_format(run),
        "prefix": FOLDER if run.recipe.adapter.prefix else None,
        **settings.to_dict(),
    }
