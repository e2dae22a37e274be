"""A merged model's folder besides its tensors: shards, config, tokenizer, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import Shape
from qlora_cli.files.source import INDEX, SINGLE

CONFIG = "config.json"
MANIFEST = "merge.json"
"""How the folder was made: base, dtype, adapter, and the judgement where one was made."""

_CARRIED = (
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
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Tokenizer, templates, generation settings, and the terms that the weights came under."""
_OF_PACKED_WEIGHTS = ("quantization_config", "torch_dtype")
"""Keys that a merged config does not have; `torch_dtype` is the old name of `dtype`."""


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its name and what lies in it, in order."""

    name: str
    shapes: Mapping[str, Shape]


def plan_shards(shapes: Mapping[str, Shape], max_bytes: int) -> list[Shard]:
    """Tensors in order, as many to a file as fit; a tensor larger than `max_bytes` stands alone.

    A single file is `model.safetensors`; several are numbered as transformers numbers them.
    """
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + shape.num_bytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += shape.num_bytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    stem, total = SINGLE.removesuffix(".safetensors"), len(groups)
    return [
        Shard(f"{stem}-{number:05d}-of-{total:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """`model.safetensors.index.json`, where there is more than one file."""
    if len(shards) == 1:
        return
    total = sum(shape.num_bytes for shard in shards for shape in shard.shapes.values())
    where = {name: shard.name for shard in shards for name in shard.shapes}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def merged_config(base: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for weights in `dtype`: nothing else of it changes."""
    content: dict[str, Any] = json.loads((base / CONFIG).read_text())
    kept = {key: value for key, value in content.items() if key not in _OF_PACKED_WEIGHTS}
    return kept | {"dtype": dtype_name(dtype)}


def copied_files(base: Path) -> list[Path]:
    """What is copied byte for byte, as paths within the base's folder."""
    found = {path for pattern in _CARRIED for path in base.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(base) for path in found)


def copy_files(base: Path, into: Path) -> None:
    """Copies the carried files."""
    for path in copied_files(base):
        (into / path).parent.mkdir(exist_ok=True)
        (into / path).write_bytes((base / path).read_bytes())
