"""Write a merged checkpoint: one tensor at a time, sharded and resumable.

The output folder appears complete or not at all. Everything is written into a partial folder next
to it, which is renamed at the end (`files/atomic.py`). A shard also gets its name only when it is
complete. If a merge was interrupted, the same merge resumes after the last complete shard; any
other merge into the same output removes the partial folder first.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.adapters.peft_prefix import FOLDER
from qlora_cli.data.template import TEMPLATE_FILE
from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.export.merge.combine import weighted_adapters_of
from qlora_cli.export.merge.folder import (
    CONFIG,
    Shard,
    copied_files,
    copy_files,
    merged_config,
    plan_shards,
    write_index,
)
from qlora_cli.export.merge.manifest import MANIFEST, MergeManifest
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.files.atomic import (
    atomic_file,
    make_partial_folder,
    partial_folders,
    publish_folder,
    remove_partial_files,
    report_write_errors,
    require_free_space,
    write_json,
)
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import TensorSpec, read_header, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
"""The default of transformers. Every file system and hub accepts files of this size."""


def write_merged(
    tensors: MergedTensors,
    base: Path,
    out: Path,
    about: Mapping[str, Any],
    observer: Observer,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    chat_template: str | None = None,
) -> None:
    """Write the merged model into the folder `out`.

    tensors: the tensors to write.
    base: the base's folder, from which config, tokenizer and license are copied.
    about: additional content of merge.json.
    observer: receives the number of written tensors.
    max_shard_bytes: size of one file's tensors at most.
    chat_template: Jinja text in place of the base's chat template; None copies that.

    Raises QloraError if the disk is too small or cannot be written, or if a value is too large for
    the dtype. Complete shards are then kept next to `out`, and the same merge resumes from them.
    Raises UsageError if another program has written into `out` in the meantime.
    """
    out = out.resolve()
    shards = plan_shards(tensors.shapes(), max_shard_bytes)
    settings = _settings(tensors, shards)
    with report_write_errors("the merged model", out):
        partial, done = _begin(out, settings, shards)
    hint = (
        f"complete files are kept in {partial}; free disk space and run the same command, which "
        "resumes from there, or remove that folder"
    )
    with report_write_errors("the merged model", out, hint):
        _require_space(out, base, [shard for shard in shards if shard.name not in done])
        _write_shards(tensors, shards, done, partial, observer)
        write_index(partial, shards)
        _write_other_files(tensors, base, partial, chat_template)
        write_json(partial / MANIFEST, {**about, "settings": settings})
        publish_folder(partial, out)


def _write_other_files(
    tensors: MergedTensors, base: Path, folder: Path, chat_template: str | None
) -> None:
    """Write the config, the tokenizer and the other files of the base into `folder`."""
    write_json(folder / CONFIG, merged_config(base, tensors.dtype, tensors.config_entries))
    copy_files(base, folder)
    if tensors.prefix is not None:
        shutil.copytree(tensors.prefix, folder / FOLDER, dirs_exist_ok=True)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template)


def find_equal_merge(out: Path, tensors: MergedTensors) -> MergedTensors | None:
    """Return the tensors in `out` if it is a complete merge of the same run, else None.

    tensors: the merge to compare with. Base and dtype may differ; the result has those of `out`.

    Raises ModelError if merge.json in `out` is damaged.
    """
    if not (out / MANIFEST).is_file():
        return None
    manifest = MergeManifest.read(out)
    merged = replace(tensors, base=manifest.base, dtype=manifest.dtype)
    shards = plan_shards(merged.shapes(), MAX_SHARD_BYTES)
    is_same = manifest.settings == _settings(merged, shards)
    is_complete = all(_is_complete(out / shard.name, shard.shapes) for shard in shards)
    return merged if is_same and is_complete else None


def _write_shards(
    tensors: MergedTensors, shards: list[Shard], done: set[str], folder: Path, observer: Observer
) -> None:
    """Write the shards that are not in `done`. done: names of complete shards in `folder`."""
    missing = [shard for shard in shards if shard.name not in done]
    total = sum(len(shard.shapes) for shard in shards)
    num_written = total - sum(len(shard.shapes) for shard in missing)
    observer.stage("merge", total)
    observer.advance(num_written)

    def compute(name: str) -> Tensor:
        nonlocal num_written
        tensor = tensors.compute(name)
        num_written += 1
        observer.advance(num_written)
        return tensor

    for shard in missing:
        with atomic_file(folder / shard.name) as file:
            write_tensors(file, shard.shapes, compute, {"format": "pt"})


def _settings(tensors: MergedTensors, shards: list[Shard]) -> dict[str, Any]:
    """Return everything that decides the bytes of the output, for merge.json.

    Two merges with equal settings write equal files.
    """
    files = sorted({entry.file for entry in tensors.source.entries.values()})
    adapters = weighted_adapters_of(tensors.adapter) if tensors.adapter is not None else ()
    return {
        "base": tensors.base,
        "dtype": dtype_name(tensors.dtype),
        "held": {key: _to_json(value) for key, value in vars(tensors.base_format.default).items()},
        "overrides": dict(tensors.base_format.overrides),
        "packed_on": tensors.device.type,
        "weights": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "adapters": [weighted.to_dict() for weighted in adapters],
        "shards": {shard.name: len(shard.shapes) for shard in shards},
    }


def _to_json(value: Any) -> Any:
    """Return the name of a dtype, and any other value unchanged."""
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def _begin(out: Path, settings: Mapping[str, Any], shards: list[Shard]) -> tuple[Path, set[str]]:
    """Return the partial folder to write into and the names of its complete shards.

    The folder is that of an interrupted merge with equal settings, else a new one. The partial
    folders of other merges into `out` are removed.
    """
    resumable = [folder for folder in partial_folders(out) if _settings_in(folder) == settings]
    for folder in partial_folders(out):
        if folder not in resumable[:1]:
            shutil.rmtree(folder, ignore_errors=True)
    if not resumable:
        partial = make_partial_folder(out)
        write_json(partial / MANIFEST, {"settings": settings})
        return partial, set()
    partial = resumable[0]
    for name in (*(shard.name for shard in shards), CONFIG, MANIFEST):
        remove_partial_files(partial / name)
    done = {shard.name for shard in shards if _is_complete(partial / shard.name, shard.shapes)}
    return partial, done


def _settings_in(partial: Path) -> dict[str, Any] | None:
    """Return the settings of an interrupted merge, or None if they cannot be read."""
    with suppress(ModelError):
        if (partial / MANIFEST).is_file():
            return MergeManifest.read(partial).settings
    return None


def _is_complete(file: Path, shapes: Mapping[str, TensorSpec]) -> bool:
    if not file.is_file():
        return False
    try:
        entries, _ = read_header(file)
    except ModelError:
        return False
    return {name: TensorSpec(entry.dtype, entry.shape) for name, entry in entries.items()} == shapes


def _require_space(out: Path, base: Path, missing: list[Shard]) -> None:
    """Raise QloraError if the disk has no space for the files that are still to be written."""
    weights = sum(shape.num_bytes for shard in missing for shape in shard.shapes.values())
    needed = weights + sum((base / path).stat().st_size for path in copied_files(base))
    require_free_space("the merged model", out.parent, needed)
