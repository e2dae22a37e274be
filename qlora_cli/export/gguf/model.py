"""Describe a Llama-like model for a GGUF file: the architecture's metadata and all tensors.

Tensor names come from the tables of the `gguf` package. Two things need more than a new name:

- llama.cpp's `llama` architecture, which Mistral also uses, applies the rotary embedding to
  neighbouring rows of a head (2 i and 2 i + 1). transformers applies it to row i and row
  i + width / 2. So the rows of q and k are reordered within each head. `qwen2` and `qwen3` use
  transformers' order.
- The llama3 scaling of the rotary frequencies is stored as a tensor with one factor per frequency
  (`rope_freqs.weight`). Only the `llama` architecture reads it.

Vectors and norms are written in float32, as llama.cpp requires. Matrices are written in the file's
encoding. A matrix whose row length is not a multiple of the encoding's block is written in float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from torch import Tensor

from qlora_cli.errors import QloraError
from qlora_cli.export.gguf.unsupported import unsupported
from qlora_cli.files.composed import model_type_of
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.registry import known_family

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""transformers' model_type -> llama.cpp's architecture."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF file.

    name: its name in the GGUF file.
    shape: (rows, width) or (width,), as in transformers.
    encoding: its type in the GGUF file.
    heads: number of heads whose rows are reordered for llama.cpp; None if the order is unchanged.
    entry: the tensor of the merged folder that the values come from, or
    values: computed values that are in no file of the folder.
    """

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    heads: int | None = None
    entry: TensorEntry | None = None
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size in the GGUF file."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.encoding]
        return torch.Size(self.shape).numel() // per_block * block_bytes

    def read(self) -> Tensor:
        """Return the source's values, in the source's dtype and row order."""
        if self.entry is None:
            assert self.values is not None
            return self.values
        return read_tensor(self.entry)

    def rows(self, num: int) -> Iterator[slice | Tensor]:
        """Yield indices of the source's rows in the order of the GGUF file, `num` at a time."""
        if self.heads is None:
            yield from (slice(start, start + num) for start in range(0, self.shape[0], num))
        else:
            halves = torch.arange(self.shape[0]).view(self.heads, 2, -1)
            yield from halves.transpose(1, 2).reshape(-1).split(num)


def architecture(config: Any) -> MODEL_ARCH:
    """Return llama.cpp's architecture for a model.

    config: the model's transformers config.

    Raises UsageError if llama.cpp has no such architecture or computes it differently.
    """
    arch = ARCHITECTURES.get(model_type_of(config))
    if arch is None:
        raise unsupported(
            f"GGUF export supports {', '.join(ARCHITECTURES)}, not {model_type_of(config)}"
        )
    if config.hidden_act != "silu":
        raise unsupported(f"llama.cpp has no {config.hidden_act} activation in {config.model_type}")
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "linear") and (kind, arch) != ("llama3", MODEL_ARCH.LLAMA):
        raise unsupported(
            f"writing rotary scaling {kind!r} of {config.model_type} to GGUF is not supported yet"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("writing a partial rotary factor to GGUF is not supported")
    if arch == MODEL_ARCH.QWEN2 and _head_dim(config) * _num_heads(config) != config.hidden_size:
        raise unsupported(
            "llama.cpp's qwen2 requires a head size of hidden_size / num_attention_heads"
        )
    if arch == MODEL_ARCH.QWEN3 and config.attention_bias:
        raise unsupported("llama.cpp's qwen3 has no biases in its attention layers")
    return arch


def write_architecture(writer: GGUFWriter, config: Any) -> None:
    """Add the metadata that llama.cpp builds the model from.

    config: the model's transformers config.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(_num_heads(config))
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def context_length(config: Any) -> int:
    """Return the number of tokens that llama.cpp may use as context.

    llama.cpp has no sliding window for these architectures. So if the model has one, the context is
    limited to it: within the window, both models attend to the same tokens.
    """
    max_positions = int(config.max_position_embeddings)
    return min(max_positions, getattr(config, "sliding_window", None) or max_positions)


def plan_tensors(folder: Path, config: Any, encoding: GGMLQuantizationType) -> list[PlannedTensor]:
    """Return every tensor of the GGUF file, in the order of the model's own tensors.

    folder: the model's folder. config: its transformers config. encoding: encoding of the matrices.

    Raises UsageError if llama.cpp does not support the model, ModelError if the folder is damaged.
    """
    arch = architecture(config)
    family = known_family(config)
    assert family is not None, "`architecture` refuses model types without a family"
    source = open_source(folder, family)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    planned = list(_rope_factors(arch, config))
    for name in source.names():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise unsupported(f"{name} has no name in llama.cpp's {MODEL_ARCH_NAMES[arch]}")
        shape = source.shape(name)
        own = _encoding(gguf_name, shape, encoding)
        heads = _heads(name, config) if arch == MODEL_ARCH.LLAMA else None
        planned.append(PlannedTensor(gguf_name, shape, own, heads, source.entry(name)))
    return planned


def _encoding(
    name: str, shape: tuple[int, ...], requested: GGMLQuantizationType
) -> GGMLQuantizationType:
    """Return the type of one tensor. requested: the encoding of the file's matrices."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    per_block, _ = GGML_QUANT_SIZES[requested]
    return GGMLQuantizationType.F16 if shape[-1] % per_block else requested


def _heads(name: str, config: Any) -> int | None:
    """Return the number of heads of a q or k projection's tensor, or None for any other tensor."""
    _, _, tail = name.rpartition(".self_attn.")
    linear = tail.partition(".")[0]
    heads = {"q_proj": _num_heads(config), "k_proj": int(config.num_key_value_heads)}
    return heads.get(linear)


def _rope_factors(arch: MODEL_ARCH, config: Any) -> Iterator[PlannedTensor]:
    """Yield the tensor of llama3 rotary factors, if the model uses them.

    llama.cpp divides each rotary frequency by its factor. The factors are computed from
    transformers' own scaling.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if attention != 1.0:
        raise QloraError(
            f"transformers scales attention by {attention} for llama3 rotary frequencies, and "
            "llama.cpp does not"
        )
    width = _head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = (plain / scaled.double()).float()
    name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
    yield PlannedTensor(name, tuple(factors.shape), GGMLQuantizationType.F32, values=factors)


def _num_heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // _num_heads(config))
