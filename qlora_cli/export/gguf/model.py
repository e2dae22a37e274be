"""What a Llama-like model is in a GGUF file: its architecture's metadata, and each tensor's place.

Names come from the `gguf` package's own tables. Two things are not a matter of names:

- llama.cpp's `llama` architecture, which is Mistral's too, turns neighbouring pairs of a head's
  rows by the rotary angle; transformers turns row i together with row i + width / 2. So q's and
  k's rows are laid in the other order, within each head. `qwen2` and `qwen3` keep transformers'.
- llama3's scaling of the rotary frequencies is a tensor of one factor a frequency
  (`rope_freqs.weight`), which only the `llama` architecture reads.

Vectors and norms are float32, as llama.cpp wants them; matrices are in the file's encoding, those
whose rows are no multiple of its block in float16.
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
from qlora_cli.export.gguf.tokenizer import unsupported
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.registry import family_of

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""transformers' model_type -> llama.cpp's architecture."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file. shape: (rows, width) or (width,), as transformers has it.

    heads: whose rows are laid in llama.cpp's order; None where the order is kept. entry: where it
    comes from. values: where it comes from no file.
    """

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    heads: int | None = None
    entry: TensorEntry | None = None
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """In the file."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.encoding]
        return torch.Size(self.shape).numel() // per_block * block_bytes

    def read(self) -> Tensor:
        """The source's values, in its dtype and order."""
        if self.entry is None:
            assert self.values is not None
            return self.values
        return read_tensor(self.entry)

    def rows(self, num: int) -> Iterator[slice | Tensor]:
        """The source's rows in the file's order, `num` at a time."""
        if self.heads is None:
            yield from (slice(start, start + num) for start in range(0, self.shape[0], num))
        else:
            halves = torch.arange(self.shape[0]).view(self.heads, 2, -1)
            yield from halves.transpose(1, 2).reshape(-1).split(num)


def architecture(config: Any) -> MODEL_ARCH:
    """llama.cpp's. Raises UsageError where it has none, or one that computes something else."""
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise unsupported(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, not for {config.model_type}"
        )
    if config.hidden_act != "silu":
        raise unsupported(f"llama.cpp has no {config.hidden_act} activation in {config.model_type}")
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "linear") and (kind, arch) != ("llama3", MODEL_ARCH.LLAMA):
        raise unsupported(
            f"rotary scaling {kind!r} of {config.model_type} is not written to GGUF yet"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("a partial rotary factor is not written to GGUF")
    if arch == MODEL_ARCH.QWEN2 and _head_dim(config) * _num_heads(config) != config.hidden_size:
        raise unsupported("llama.cpp's qwen2 has heads of hidden_size / num_attention_heads only")
    if arch == MODEL_ARCH.QWEN3 and config.attention_bias:
        raise unsupported("llama.cpp's qwen3 has no biases in its attention")
    return arch


def write_architecture(writer: GGUFWriter, config: Any) -> None:
    """Adds the metadata that the model is built from."""
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
    """Tokens. These architectures have no sliding window there, so a text may not outgrow it."""
    longest = int(config.max_position_embeddings)
    return min(longest, getattr(config, "sliding_window", None) or longest)


def plan_tensors(folder: Path, config: Any, encoding: GGMLQuantizationType) -> list[PlannedTensor]:
    """Every tensor of the file, in the order of the model's own. Raises ModelError, UsageError."""
    arch = architecture(config)
    source = open_source(folder, family_of(config))
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    planned = list(_rope_factors(arch, config))
    for name in source.names():
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None:
            raise unsupported(f"{name} has no name in llama.cpp's {MODEL_ARCH_NAMES[arch]}")
        shape = source.shape(name)
        own = _encoding(told, shape, encoding)
        heads = _heads(name, config) if arch == MODEL_ARCH.LLAMA else None
        planned.append(PlannedTensor(told, shape, own, heads, source.entry(name)))
    return planned


def _encoding(
    name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    per_block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % per_block else wanted


def _heads(name: str, config: Any) -> int | None:
    _, _, tail = name.rpartition(".self_attn.")
    linear = tail.partition(".")[0]
    heads = {"q_proj": _num_heads(config), "k_proj": int(config.num_key_value_heads)}
    return heads.get(linear)


def _rope_factors(arch: MODEL_ARCH, config: Any) -> Iterator[PlannedTensor]:
    """What llama.cpp divides each rotary frequency by, asked of transformers' own scaling."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if attention != 1.0:
        raise QloraError(f"transformers scales attention by {attention} with llama3 frequencies")
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
