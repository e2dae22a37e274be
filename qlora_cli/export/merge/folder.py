"""The files of a merged model other than its tensors: shards, index, config and copied files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.files.source import WEIGHTS_FILE, WEIGHTS_INDEX

CONFIG = "config.json"

_COPIED_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Tokenizer, chat templates, settings of generation and of images, the license of the weights."""
_DROPPED_KEYS = ("quantization_config", "torch_dtype")
"""Keys of the base's config.json that a merged one does not have: the merged weights are not
quantized, and `torch_dtype` is the old name of `dtype`."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint.

    name: the file's name. shapes: tensor name -> shape and dtype, in the order of the file.
    """

    name: str
    shapes: Mapping[str, TensorSpec]


def plan_shards(shapes: Mapping[str, TensorSpec], max_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `max_bytes` bytes, in the given order.

    A tensor larger than `max_bytes` gets a file of its own. A single file is named
    `model.safetensors`; several files are numbered as transformers numbers them.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + shape.num_bytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += shape.num_bytes
    if len(groups) == 1:
        return [Shard(WEIGHTS_FILE, groups[0])]
    stem, total = WEIGHTS_FILE.removesuffix(".safetensors"), len(groups)
    return [
        Shard(f"{stem}-{number:05d}-of-{total:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Write `model.safetensors.index.json` into `folder` if there is more than one shard."""
    if len(shards) == 1:
        return
    total = sum(shape.num_bytes for shard in shards for shape in shard.shapes.values())
    file_of_tensor = {name: shard.name for shard in shards for name in shard.shapes}
    content = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(file_of_tensor.items())),
    }
    (folder / WEIGHTS_INDEX).write_text(json.dumps(content, indent=2) + "\n")


def merged_config(
    base: Path, dtype: torch.dtype, entries: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the config.json of a merged model: the base's, with `dtype` as the weights' dtype.

    base: the base's folder. entries: that differ from the base's.
    """
    content: dict[str, Any] = json.loads((base / CONFIG).read_text())
    kept = {key: value for key, value in content.items() if key not in _DROPPED_KEYS}
    changed: dict[str, Any] = json.loads(json.dumps(dict(entries)))  # With text as every key.
    return kept | changed | {"dtype": dtype_name(dtype)}


def copied_files(base: Path) -> list[Path]:
    """Return the files that merging copies unchanged, as paths relative to the base's folder."""
    paths = {path for pattern in _COPIED_PATTERNS for path in base.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(base) for path in paths)


def copy_files(base: Path, into: Path) -> None:
    """Copy `copied_files(base)` from the base's folder into the folder `into`."""
    for path in copied_files(base):
        (into / path).parent.mkdir(exist_ok=True)
        (into / path).write_bytes((base / path).read_bytes())
