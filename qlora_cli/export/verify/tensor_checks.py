"""Check every tensor of a merged folder against what merging must write.

Each tensor is computed again from the base and the adapter, one at a time, and compared bit for
bit. If the bits of an adapted tensor differ, only the error of the sum itself is allowed
(`MergedTensors.within_rounding_error`). A tensor that was only copied, or only packed and unpacked,
has no such error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor
from qlora_cli.files.source import WEIGHTS_FILE, WEIGHTS_INDEX, read_folder
from qlora_cli.units import format_count

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json")
"""Patterns of the files that transformers may load weights from."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element -> the integer dtype that compares the bits."""


def structure_faults(merged: Path, expected: MergedTensors) -> Iterator[str]:
    """Yield a line for each missing or foreign tensor, each wrong shape and each foreign file.

    If there is one, the folder is not this model, and its tensors cannot be compared.
    """
    try:
        entries = read_folder(merged)
    except ModelError as fault:
        yield str(fault)
        return
    yield from _weight_file_faults(merged, entries)
    adapted = expected.adapted_names()
    for name, shape in expected.shapes().items():
        if name not in entries:
            layer = ", and with it the adapter's layer" if name in adapted else ""
            yield f"{name} is missing{layer}; merge again"
        elif entries[name].shape != shape.shape:
            yield f"{name} has shape {entries[name].shape}; it must be {shape.shape}"
    for name in sorted(entries.keys() - expected.shapes().keys()):
        yield f"{name} does not belong to this model; merge again"


def _weight_file_faults(merged: Path, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Yield a line for each wrong entry of the index and each foreign weight file.

    transformers would load a foreign file in addition to the merged tensors or instead of them.
    """
    used = {WEIGHTS_FILE}
    if not (merged / WEIGHTS_FILE).is_file():
        used = {WEIGHTS_INDEX, *(entry.file.name for entry in entries.values())}
        weight_map = json.loads((merged / WEIGHTS_INDEX).read_text())["weight_map"]
        for name in sorted(weight_map.keys() | entries.keys()):
            file = entries[name].file.name if name in entries else "no file"
            listed = weight_map.get(name, "no file")
            if listed != file:
                yield (
                    f"{WEIGHTS_INDEX}: {name} is listed in {listed}, but it is in {file}; merge "
                    "again"
                )
    for pattern in _WEIGHT_FILES:
        for path in sorted(merged.glob(pattern)):
            if path.name not in used:
                yield (
                    f"{path.name} does not belong to the merged model, and transformers would load "
                    "it; remove it"
                )


def value_faults(merged: Path, expected: MergedTensors, observer: Observer) -> Iterator[str]:
    """Yield a line for each tensor with a wrong dtype or wrong values.

    Tensors that are missing or have a wrong shape are skipped; `structure_faults` reports them.

    observer: receives the number of compared tensors.

    Raises ModelError if the folder is damaged.
    """
    entries, shapes = read_folder(merged), expected.shapes()
    observer.stage("verify", len(shapes))
    for done, (name, shape) in enumerate(shapes.items(), 1):
        entry = entries.get(name)
        if entry is not None and entry.shape == shape.shape:
            if entry.dtype != shape.dtype:
                yield f"{name} is {dtype_name(entry.dtype)}; it must be {dtype_name(shape.dtype)}"
            else:
                yield from _differences(name, entry, expected)
        observer.advance(done)


def _differences(name: str, entry: TensorEntry, expected: MergedTensors) -> Iterator[str]:
    # The expected tensor is computed first, because computing it needs more memory for a moment.
    expected_tensor, tensor = expected.compute(name), read_tensor(entry)
    num_differing = _num_differing(tensor, expected_tensor)
    if not num_differing:
        return
    del expected_tensor
    share = f"{format_count(num_differing)} of {format_count(tensor.numel())} values"
    if name not in expected.adapted_names():
        yield f"{name} differs from the base's tensor in {share}; merge again"
    elif not expected.within_rounding_error(name, tensor):
        base_tensor = replace(expected, adapter=None).compute(name)
        if not _num_differing(tensor, base_tensor):
            yield f"{name} equals the base's tensor, the adapter's layer was not added; merge again"
        else:
            yield f"{name} differs from base + scaling B A in {share}; merge again"


def _num_differing(tensor: Tensor, expected: Tensor) -> int:
    """Return how many values differ in any bit. NaN equals itself, and -0 differs from 0."""
    integer = _INTEGERS[tensor.dtype.itemsize]
    bits, expected_bits = tensor.view(integer), expected.view(integer)
    return 0 if torch.equal(bits, expected_bits) else int((bits != expected_bits).sum())
