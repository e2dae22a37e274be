"""A merged model as one GGUF file, for llama.cpp and what is built on it.

Written from the merged folder's own tensors, one at a time, and then read back and compared with
them, each value; the file takes its name after that. The exact meaning of "compared":

- metadata: every key holds what the folder gives;
- float32 and float16 tensors: bit for bit the source's values, rounded to that dtype;
- Q8_0 tensors: bit for bit the `gguf` package's own quantization, and unpacked again each value
  within half a step of the source's, plus what rounding the block's step d to float16 moves it:
  |x - q d16| <= d / 2 + |q| |d - d16|.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
)
from gguf.quants import quantize
from torch import Tensor

from qlora_cli.errors import QloraError, UsageError, VerificationFailed
from qlora_cli.events import Observer
from qlora_cli.export.gguf.model import (
    PlannedTensor,
    architecture,
    context_length,
    plan_tensors,
    write_architecture,
)
from qlora_cli.export.gguf.tokenizer import Vocabulary, read_vocabulary
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.files.atomic import (
    atomic_file,
    remove_partial_files,
    report_write_errors,
    require_free_space,
)
from qlora_cli.files.locate import read_config

GgufEncoding = Literal["f16", "q8_0"]

_FILE_TYPES = {
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}
_ELEMENTS = 2**18
"""Of a tensor that are in float32 at a time: 1 MiB, which stays in a processor's cache."""
MAX_FAULTS = 10
"""Told one by one; the rest is counted."""


class GgufPlan:
    """The file that a model's folder gives, before a tensor is read.

    Raises UsageError where llama.cpp cannot have the model or its tokenizer, ModelError where the
    folder is damaged.
    """

    def __init__(self, folder: Path, encoding: GgufEncoding) -> None:
        self.folder = folder
        self.encoding = encoding
        self.config: Any = read_config(folder / CONFIG)
        self.tensors = plan_tensors(folder, self.config, _FILE_TYPES[encoding][1])
        self.vocabulary: Vocabulary = read_vocabulary(folder, self.config.vocab_size)

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(planned.num_bytes for planned in self.tensors)

    def notes(self) -> list[str]:
        """Where llama.cpp does other than the folder's own model."""
        length = context_length(self.config)
        shorter = length < self.config.max_position_embeddings
        window = [f"llama.cpp has no sliding window here: its context is {length:,} tokens"]
        half = [planned.name for planned in self.tensors if self._is_half(planned)]
        in_half = [f"{len(half)} tensors have rows that are no multiple of 32: they are in float16"]
        return [*self.vocabulary.notes, *(window if shorter else []), *(in_half if half else [])]

    def writer(self) -> GGUFWriter:
        """All that stands before the tensors' values."""
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture(self.config)])
        writer.add_type(GGUFType.MODEL)
        writer.add_file_type(_FILE_TYPES[self.encoding][0])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_architecture(writer, self.config)
        self.vocabulary.write(writer)
        for planned in self.tensors:
            kind = np.dtype(np.float32)  # Only told apart from bytes; `raw_dtype` decides.
            writer.add_tensor_info(
                planned.name, planned.shape, kind, planned.num_bytes, planned.encoding
            )
        return writer

    def _is_half(self, planned: PlannedTensor) -> bool:
        wanted = _FILE_TYPES[self.encoding][1]
        return planned.encoding == GGMLQuantizationType.F16 != wanted


def check_exportable(base: Path, encoding: GgufEncoding, out: Path, merged_bytes: int) -> None:
    """Before a merge into `out`: can its model be a GGUF file, and will the disk hold both?

    base: the folder of config and tokenizer. Raises UsageError, ModelError, QloraError.
    """
    needed = GgufPlan(base, encoding).num_bytes + merged_bytes
    there = next(parent for parent in out.resolve().parents if parent.is_dir())
    require_free_space("the merged model with its GGUF file", there, needed)


def export_gguf(folder: Path, encoding: GgufEncoding, observer: Observer) -> Path:
    """Writes `model-F16.gguf` or `model-Q8_0.gguf` into a merged folder; its path.

    The file appears whole and proved, or not at all. Raises VerificationFailed where it was not
    read back as it should be, QloraError where the disk refuses or a value does not fit float16,
    UsageError and ModelError as `GgufPlan` does, and UsageError where another file has its name.
    """
    plan = GgufPlan(folder, encoding)
    for note in plan.notes():
        observer.note(note)
    file = folder / f"model-{encoding.upper()}.gguf"
    if file.exists():
        _check_same(file, plan, observer)
        return file
    with report_write_errors("the GGUF file", file):
        remove_partial_files(file)
        with atomic_file(file) as beside:
            _write(plan, beside, observer)
            verify_gguf(beside, plan, observer)
    return file


def _check_same(file: Path, plan: GgufPlan, observer: Observer) -> None:
    """Raises UsageError where an existing file is not the one that would be written."""
    if not file.is_file() or any(_faults(file, plan, observer)):
        raise UsageError(
            f"{file} exists and is not the GGUF file of this merged model",
            where="--gguf",
            hint="move the file elsewhere or remove it, and run the same command again",
        )


def verify_gguf(file: Path, plan: GgufPlan, observer: Observer) -> None:
    """Raises VerificationFailed that names what in the file is not as planned."""
    faults = list(_faults(file, plan, observer))
    if faults:
        rest = len(faults) - MAX_FAULTS
        told = [*faults[:MAX_FAULTS], *([f"and {rest} more"] if rest > 0 else [])]
        raise VerificationFailed(
            "the GGUF file is not the merged model: " + "; ".join(told),
            where=str(file),
            hint="check the disk and merge again; the folder's safetensors are not touched by this",
        )


def _write(plan: GgufPlan, file: Path, observer: Observer) -> None:
    writer = plan.writer()
    observer.stage("gguf", len(plan.tensors))
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, planned in enumerate(plan.tensors, 1):
            writer.write_tensor_data(_encoded(planned))
            observer.advance(done)
        writer.flush()
    finally:
        writer.close()


def _encoded(planned: PlannedTensor) -> np.ndarray[Any, Any]:
    """The tensor's values as they lie in the file."""
    whole = np.empty(planned.num_bytes, np.uint8)
    done = 0
    for _, part in _parts(planned):
        whole[done : done + part.nbytes] = part.reshape(-1).view(np.uint8)
        done += part.nbytes
    return whole


def _parts(planned: PlannedTensor) -> Iterator[tuple[Tensor, np.ndarray[Any, Any]]]:
    """(source's values in the file's order, the same as they lie in the file), some rows a time."""
    tensor = planned.read()
    for rows in planned.rows(max(1, _ELEMENTS // torch.Size(planned.shape[1:]).numel())):
        values = tensor[rows]
        yield values, _encode(values, planned)


def _encode(values: Tensor, planned: PlannedTensor) -> np.ndarray[Any, Any]:
    dtype = _TYPES.get(planned.encoding)
    # The step of a Q8_0 block is float16, and 127 steps reach the block's largest value.
    largest = torch.finfo(dtype).max if dtype else 127 * torch.finfo(torch.float16).max
    least, most = values.aminmax()
    if not max(-least, most) <= largest:  # written so that NaN is refused
        raise QloraError(
            f"{planned.name} has values that {planned.encoding.name} cannot hold",
            where="--gguf",
            hint="leave --gguf out and convert the merged folder with llama.cpp's "
            "convert_hf_to_gguf.py --outtype bf16",
        )
    if dtype:
        return values.to(dtype).numpy()
    return quantize(values.float().numpy(), planned.encoding)


def _faults(file: Path, plan: GgufPlan, observer: Observer) -> Iterator[str]:
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as fault:
        yield f"it cannot be read: {fault}"
        return
    yield from _metadata_faults(reader, plan)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name in sorted(found.keys() - {planned.name for planned in plan.tensors}):
        yield f"{name} does not belong to this model"
    observer.stage("gguf read back", len(plan.tensors))
    for done, planned in enumerate(plan.tensors, 1):
        tensor = found.get(planned.name)
        if tensor is None:
            yield f"{planned.name} is missing"
        elif (tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))) != (
            planned.encoding,
            planned.shape,
        ):
            yield f"{planned.name} has another type or shape"
        else:
            yield from _value_faults(planned, tensor.data)
        observer.advance(done)


def _metadata_faults(reader: GGUFReader, plan: GgufPlan) -> Iterator[str]:
    (wanted,) = plan.writer().kv_data
    for key, value in wanted.items():
        field = reader.get_field(key)
        expected = value.value
        if value.type == GGUFValueType.FLOAT32:
            expected = float(np.float32(expected))
        if field is None or field.contents() != expected:
            yield f"{key} is not what the folder gives"


def _value_faults(planned: PlannedTensor, found: np.ndarray[Any, Any]) -> Iterator[str]:
    rows = differing = 0
    for values, wanted in _parts(planned):
        part = found[rows : rows + len(wanted)]
        rows += len(wanted)
        differing += int((part.view(np.uint8) != wanted.view(np.uint8)).sum())
        if planned.encoding == GGMLQuantizationType.Q8_0:
            differing += _num_beyond(values.float().numpy(), part)
    if differing:
        yield f"{planned.name} differs from the merged folder's in {differing:,} bytes or values"


def _num_beyond(values: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> int:
    """Values of a Q8_0 tensor that lie farther from the source than its rounding can put them."""
    blocks = found.reshape(-1, 34)
    weight_format = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = blocks[:, 2:].view(np.int8).astype(np.float32)
    source = values.reshape(-1, 32)
    step = np.abs(source).max(axis=1, keepdims=True) / np.float32(127)
    # A product of 7 and 11 bits is exact; the nearest number is found up to float32's rounding.
    allowed = step * np.float32(0.5 + 2.0**-16) + np.abs(numbers) * np.abs(step - weight_format)
    return int((np.abs(source - numbers * weight_format) > allowed).sum())
