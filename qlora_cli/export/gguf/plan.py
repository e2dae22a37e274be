"""Plan a GGUF file from a model's folder: its metadata and tensors, before a tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
)

from qlora_cli.export.gguf.model import (
    PlannedTensor,
    architecture,
    context_length,
    plan_tensors,
    write_architecture,
)
from qlora_cli.export.gguf.tokenizer import Vocabulary, read_vocabulary
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.options import GgufEncoding
from qlora_cli.files.locate import read_config

FILE_TYPES: dict[GgufEncoding, tuple[LlamaFileType, GGMLQuantizationType]] = {
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
"""Encoding of the command line -> the type of the file and of its matrices."""


class GgufPlan:
    """The GGUF file of a model's folder: its metadata, and each tensor's name, shape and type.

    folder: the folder of the model. encoding: encoding of the matrices.

    The constructor raises UsageError if llama.cpp does not support the model or its tokenizer, and
    ModelError if the folder is damaged.
    """

    def __init__(self, folder: Path, encoding: GgufEncoding) -> None:
        self.folder = folder
        self.encoding: GgufEncoding = encoding
        self.config: Any = read_config(folder / CONFIG)
        self.tensors = plan_tensors(folder, self.config, FILE_TYPES[encoding][1])
        self.vocabulary: Vocabulary = read_vocabulary(folder, self.config.vocab_size)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in the file."""
        return sum(planned.num_bytes for planned in self.tensors)

    def notes(self) -> list[str]:
        """Return where llama.cpp's model differs from the folder's own, one line each."""
        notes = list(self.vocabulary.notes)
        length = context_length(self.config)
        if length < self.config.max_position_embeddings:
            notes.append(
                "llama.cpp has no sliding window for this architecture: the context is limited to "
                f"{length:,} tokens"
            )
        num_half = sum(self._falls_back_to_half(planned) for planned in self.tensors)
        if num_half:
            notes.append(
                f"{num_half} tensors are written in float16, because the length of their rows is "
                "not a multiple of 32"
            )
        return notes

    def writer(self) -> GGUFWriter:
        """Return a writer that contains everything in the file before the tensors' values."""
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture(self.config)])
        writer.add_type(GGUFType.MODEL)
        writer.add_file_type(FILE_TYPES[self.encoding][0])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_architecture(writer, self.config)
        self.vocabulary.write(writer)
        for planned in self.tensors:
            # The writer needs a dtype that is not uint8; `raw_dtype` sets the type in the file.
            dtype = np.dtype(np.float32)
            writer.add_tensor_info(
                planned.name, planned.shape, dtype, planned.num_bytes, planned.encoding
            )
        return writer

    def _falls_back_to_half(self, planned: PlannedTensor) -> bool:
        requested = FILE_TYPES[self.encoding][1]
        return planned.encoding == GGMLQuantizationType.F16 != requested
