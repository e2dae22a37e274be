"""PEFT's format of a prefix: a folder with one tensor `prompt_embeddings`, (N, 2 L G D).

L blocks have keys and values of G heads of D values. A row of the tensor is (L, 2, G, D): for each
block first the keys and then the values.

Source: peft 0.21.2, `tuners/prefix_tuning` and `PeftModel.get_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.adapters.peft_config import CONFIG, WEIGHTS
from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import read_json, write_json
from qlora_cli.files.finite import finite_cpu_copy
from qlora_cli.files.safetensors_io import (
    TensorSpec,
    is_finite,
    read_header,
    read_tensor,
    write_tensors,
)
from qlora_cli.nn.prefix import BlockPrefix

FOLDER = "prefix"
"""Name of the folder of a prefix, inside the adapter's folder or that of a merged model."""
_PEFT_TYPE = "PREFIX_TUNING"
_TENSOR = "prompt_embeddings"


def prefix_folder(folder: Path) -> Path | None:
    """Return the folder of the prefix that belongs to an adapter or a merged model, or None."""
    found = folder / FOLDER
    return found if (found / CONFIG).is_file() else None


def write_prefix(prefixes: Sequence[BlockPrefix], folder: Path, base: str | None) -> None:
    """Write the prefixes of all blocks to `folder`, a new one. base: name of the base.

    Raises NotFinite if a value is NaN or infinite, OSError if the disk is full.
    """
    folder.mkdir()
    length, heads, size = prefixes[0].key.shape
    config = {
        "peft_type": _PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(prefixes),
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    write_json(folder / CONFIG, config)
    flat = [p.detach().flatten(1) for prefix in prefixes for p in (prefix.key, prefix.value)]
    values = torch.cat(flat, dim=1)
    specs = {_TENSOR: TensorSpec(values.dtype, tuple(values.shape))}
    write_tensors(
        folder / WEIGHTS, specs, lambda name: finite_cpu_copy(name, values), {"format": "pt"}
    )


@dataclass(frozen=True)
class StoredPrefix:
    """A prefix that was read from a file. values: (N, L, 2, G, D) on the CPU."""

    values: Tensor

    @property
    def length(self) -> int:
        """Return N."""
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (L, G, D), which the base must have."""
        _, blocks, _, heads, size = self.values.shape
        return blocks, heads, size

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values (N, G, D) of one block."""
        return self.values[:, index, 0].clone(), self.values[:, index, 1].clone()


def read_prefix(folder: Path) -> StoredPrefix:
    """Read a prefix. Raises ModelError if its files are missing, damaged or not supported."""
    length, blocks, heads, width = read_json(folder / CONFIG, _sizes, ModelError)
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"no {WEIGHTS} in {folder}")
    entries, _ = read_header(file)
    shape = (length, 2 * blocks * width)
    found = {name: entry.shape for name, entry in entries.items()}
    if found != {_TENSOR: shape}:
        raise ModelError(
            f"by {CONFIG} it has {_TENSOR} {shape}, but the file has {found}", where=str(file)
        )
    values = read_tensor(entries[_TENSOR])
    if not is_finite(values):
        raise ModelError("the prefix has values that are not finite", where=str(file))
    return StoredPrefix(values.view(length, blocks, 2, heads, width // heads))


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return (N, L, G, G D) from the content of adapter_config.json."""
    assert config["peft_type"] == _PEFT_TYPE, f"peft_type is {config['peft_type']}"
    assert not config.get("prefix_projection"), "prefix_projection is not supported"
    keys = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    length, blocks, heads, width = (config[key] for key in keys)
    for key in keys:
        assert type(config[key]) is int, f"{key} is no number"
        assert config[key] > 0, f"{key} is {config[key]}"
    assert width % heads == 0, "token_dim is no multiple of num_attention_heads"
    return length, blocks, heads, width
