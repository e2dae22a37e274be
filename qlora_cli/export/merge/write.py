"""Writes a merged checkpoint: one tensor at a time, sharded, resumable, whole or absent.

Everything is written into a folder beside the output, which takes the output's name at the end. A
shard gets its name when it is whole, so a merge that was killed resumes behind its last whole
shard, if it was the same merge; otherwise the leftovers are removed. A mark in such a folder keeps
it apart from a user's folder with a similar name.
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
from qlora_cli.files.safetensors_io import Shape, read_header, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
"""As transformers writes by default: files that every file system and hub takes."""


def write_merged(
    tensors: MergedTensors,
    base: Path,
    out: Path,
    about: Mapping[str, Any],
    observer: Observer,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the whole folder `out`. base: where config and tokenizer come from.

    about: kept in merge.json. Raises QloraError where the disk is too small or refuses, and where
    a value does not fit the dtype; what is whole by then is kept beside `out` and used next time.
    Raises UsageError where something lies in `out` at the end.
    """
    out = out.resolve()
    shards = plan_shards(tensors.shapes(), max_shard_bytes)
    settings = _settings(tensors, shards)
    with report_write_errors("the merged model", out):
        beside, done = _begin(out, settings, shards)
    hint = (
        f"whole files are kept in {beside}; free disk space and run the same command, which "
        "resumes from there, or remove that folder"
    )
    with report_write_errors("the merged model", out, hint):
        _check_room(out, base, [shard for shard in shards if shard.name not in done])
        _write_shards(tensors, shards, done, beside, observer)
        write_index(beside, shards)
        write_json(beside / CONFIG, merged_config(base, tensors.dtype))
        copy_files(base, beside)
        write_json(beside / MANIFEST, {**about, "settings": settings})
        publish_folder(beside, out)


def find_equal_merge(out: Path, tensors: MergedTensors) -> MergedTensors | None:
    """The tensors as `out` holds them, where it is a whole merge of them in any base and dtype.

    Raises ModelError where its merge.json is damaged.
    """
    if not (out / MANIFEST).is_file():
        return None
    made = MergeManifest.read(out)
    merged = replace(tensors, base=made.base, dtype=made.dtype)
    shards = plan_shards(merged.shapes(), MAX_SHARD_BYTES)
    same = made.settings == _settings(merged, shards)
    whole = all(_is_whole(out / shard.name, shard.shapes) for shard in shards)
    return merged if same and whole else None


def _write_shards(
    tensors: MergedTensors,
    shards: list[Shard],
    done: set[str],
    beside: Path,
    observer: Observer,
) -> None:
    missing = [shard for shard in shards if shard.name not in done]
    total = sum(len(shard.shapes) for shard in shards)
    behind = total - sum(len(shard.shapes) for shard in missing)
    observer.stage("merge", total)
    observer.advance(behind)

    def make(name: str) -> Tensor:
        nonlocal behind
        made = tensors.compute(name)
        behind += 1
        observer.advance(behind)
        return made

    for shard in missing:
        with atomic_file(beside / shard.name) as file:
            write_tensors(file, shard.shapes, make, {"format": "pt"})


def _settings(tensors: MergedTensors, shards: list[Shard]) -> dict[str, Any]:
    """What decides every byte of the output: two merges with the same settings are the same."""
    files = sorted({entry.file for entry in tensors.source.entries.values()})
    adapter = tensors.adapter
    return {
        "base": tensors.base,
        "dtype": dtype_name(tensors.dtype),
        "held": {key: _told(value) for key, value in vars(tensors.weight_format).items()},
        "packed_on": tensors.device.type,
        "weights": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "adapters": []
        if adapter is None
        else [term.to_dict() for term in weighted_adapters_of(adapter)],
        "shards": {shard.name: len(shard.shapes) for shard in shards},
    }


def _told(value: Any) -> Any:
    """For JSON, which has no dtypes."""
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def _begin(out: Path, settings: Mapping[str, Any], shards: list[Shard]) -> tuple[Path, set[str]]:
    """(the folder to write into, names of shards that an earlier, equal merge wrote whole).

    Removes what other merges into `out` left.
    """
    equal = [left for left in partial_folders(out) if _settings_in(left) == settings]
    for left in partial_folders(out):
        if left not in equal[:1]:
            shutil.rmtree(left, ignore_errors=True)
    if not equal:
        beside = make_partial_folder(out)
        write_json(beside / MANIFEST, {"settings": settings})
        return beside, set()
    for name in (*(shard.name for shard in shards), CONFIG, MANIFEST):
        remove_partial_files(equal[0] / name)
    whole = {shard.name for shard in shards if _is_whole(equal[0] / shard.name, shard.shapes)}
    return equal[0], whole


def _settings_in(left: Path) -> dict[str, Any] | None:
    """The settings of an unfinished merge; None where they cannot be read."""
    with suppress(ModelError):
        if (left / MANIFEST).is_file():
            return MergeManifest.read(left).settings
    return None


def _is_whole(file: Path, shapes: Mapping[str, Shape]) -> bool:
    if not file.is_file():
        return False
    try:
        entries, _ = read_header(file)
    except ModelError:
        return False
    return {name: Shape(entry.dtype, entry.shape) for name, entry in entries.items()} == shapes


def _check_room(out: Path, base: Path, missing: list[Shard]) -> None:
    """Raises QloraError where the disk cannot take what is still to be written."""
    weights = sum(shape.num_bytes for shard in missing for shape in shard.shapes.values())
    needed = weights + sum((base / path).stat().st_size for path in copied_files(base))
    require_free_space("the merged model", out.parent, needed)
