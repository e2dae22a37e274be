"""Fault by fault: is every tensor and every file of a merged folder what merging must write?

Each tensor is computed again from the base and the adapter and compared bit for bit, one at a time.
Where bits of an adapted tensor differ, the sum's own error is allowed for (`MergedTensors.within_rounding_error`)
and nothing else: a tensor that only was copied, or only unpacked, has no error to allow for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.export.merge.folder import CONFIG, copied_files, merged_config
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor
from qlora_cli.files.source import WEIGHTS_FILE, WEIGHTS_INDEX, read_folder
from qlora_cli.units import format_count

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def structure_faults(merged: Path, expected: MergedTensors) -> Iterator[str]:
    """Missing and foreign tensors and files, and wrong shapes; then there is no model to ask."""
    try:
        found = read_folder(merged)
    except ModelError as fault:
        yield str(fault)
        return
    yield from _weight_file_faults(merged, found)
    adapted = expected.adapted_names()
    for name, shape in expected.shapes().items():
        if name not in found:
            lost = ", and the adapter's layer with it" if name in adapted else ""
            yield f"{name} is missing{lost}"
        elif found[name].shape != shape.shape:
            yield f"{name} has shape {found[name].shape}; it must be {shape.shape}"
    for name in sorted(found.keys() - expected.shapes().keys()):
        yield f"{name} does not belong to this model"


def _weight_file_faults(merged: Path, found: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Files that transformers would load beside these tensors or instead of them."""
    used = {WEIGHTS_FILE}
    if not (merged / WEIGHTS_FILE).is_file():
        used = {WEIGHTS_INDEX, *(entry.file.name for entry in found.values())}
        told = json.loads((merged / WEIGHTS_INDEX).read_text())["weight_map"]
        for name in sorted(told.keys() | found.keys()):
            file = found[name].file.name if name in found else None
            if told.get(name) != file:
                yield f"{WEIGHTS_INDEX}: {name} is said to lie in {told.get(name)}; it lies in {file}"
    for pattern in _WEIGHTS:
        for path in sorted(merged.glob(pattern)):
            if path.name not in used:
                yield f"{path.name} does not belong there: it is loaded too, or instead"


def value_faults(merged: Path, expected: MergedTensors, observer: Observer) -> Iterator[str]:
    """Wrong dtypes and values, of the tensors whose structure is right. Raises ModelError."""
    found, shapes = read_folder(merged), expected.shapes()
    observer.stage("verify", len(shapes))
    for done, (name, shape) in enumerate(shapes.items(), 1):
        entry = found.get(name)
        if entry is not None and entry.shape == shape.shape:
            if entry.dtype != shape.dtype:
                yield f"{name} is {dtype_name(entry.dtype)}; it must be {dtype_name(shape.dtype)}"
            else:
                yield from _differences(name, entry, expected)
        observer.advance(done)


def _differences(name: str, entry: TensorEntry, expected: MergedTensors) -> Iterator[str]:
    # In this order, because making one takes more memory for a moment.
    wanted, found = expected.compute(name), read_tensor(entry)
    differing = _num_differing(found, wanted)
    if not differing:
        return
    del wanted
    if name not in expected.adapted_names():
        yield f"{name} differs from the base's in {_share(differing, found)}"
    elif not expected.within_rounding_error(name, found):
        alone = replace(expected, adapter=None).compute(name)
        if not _num_differing(found, alone):
            yield f"{name} is the base's alone: the adapter's layer was not added"
        else:
            yield f"{name} differs from base + scaling B A in {_share(differing, found)}"


def file_faults(merged: Path, base: Path) -> Iterator[str]:
    """What is wrong with tokenizer, templates and generation settings."""
    for path in copied_files(base):
        if not (merged / path).is_file():
            yield f"{path} was not carried over from the base"
        elif not _same_content(merged / path, base / path):
            yield f"{path} is not the base's{_first_key(merged / path, base / path)}"
    for path in copied_files(merged):
        if not (base / path).is_file():
            yield f"{path} is not among the base's files"


def config_faults(merged: Path, base: Path, dtype: torch.dtype) -> Iterator[str]:
    """Where config.json is not the base's for weights in `dtype`."""
    wanted = merged_config(base, dtype)
    try:
        found = json.loads((merged / CONFIG).read_text())
    except ValueError as fault:
        yield f"{CONFIG} is damaged: {fault}"
        return
    for key in sorted(wanted.keys() | found.keys()):
        # An absent key is not null: a class may have a default of its own for it.
        here, there = (json.dumps(c[key]) if key in c else "absent" for c in (found, wanted))
        if here != there:
            yield f"{CONFIG}: {key} is {here}; it must be {there}"


def loading_faults(merged: Path, model_class: Any) -> Iterator[str]:
    """What transformers complains of when it loads the folder's tensors.

    It is given their names, shapes and dtypes alone, on meta: it would map the whole files, which a
    process with a limit on its memory may not.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in read_folder(merged).items()
    }
    try:
        disable_progress_bar()  # Nothing is read, so there is nothing to wait for.
        config = AutoConfig.from_pretrained(merged, trust_remote_code=False)
        with torch.device("meta"):
            kind: Any = type(model_class.from_config(config, trust_remote_code=False))
        _, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as fault:
        yield f"transformers cannot load it: {fault}"
        return
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            told = ", ".join(map(str, sorted(info[what])))
            yield f"transformers finds {what.replace('_', ' ')}: {told}"


def _same_content(file: Path, other: Path) -> bool:
    """Byte for byte, or the same JSON: another program may have laid it out anew."""
    if file.read_bytes() == other.read_bytes():
        return True
    return file.suffix == ".json" and _json(file) == _json(other) is not None


def _first_key(file: Path, other: Path) -> str:
    """`: bos_token is "<s>"; it must be "<|im_start|>"`, where both are JSON objects."""
    found, wanted = _json(file), _json(other)
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return ""
    for key in sorted(found.keys() | wanted.keys()):
        here, there = json.dumps(found.get(key)), json.dumps(wanted.get(key))
        if here != there:
            return f": {key} is {here[:80]}; it must be {there[:80]}"
    return ""


def _json(file: Path) -> Any:
    if file.suffix != ".json":
        return None
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def _num_differing(found: Tensor, wanted: Tensor) -> int:
    """Values that differ in any bit; NaN equals itself and -0 is not 0."""
    bits = _BITS[found.dtype.itemsize]
    found, wanted = found.view(bits), wanted.view(bits)
    return 0 if torch.equal(found, wanted) else int((found != wanted).sum())


def _share(differing: int, tensor: Tensor) -> str:
    return f"{format_count(differing)} of {format_count(tensor.numel())} values"
