"""run.json: what a run is and why each automatic choice was made."""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.source import fingerprint
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.runs.layout import RunFolder

_PACKAGES = ("qlora-cli", "torch", "bitsandbytes", "transformers", "accelerate", "safetensors")


def describe_run(prepared: Prepared, recipe_path: Path | None, steps: int) -> dict[str, Any]:
    """What is known before the base is loaded; status `running`."""
    facts = prepared.profile
    return {
        "status": "running",
        "steps": steps,
        "recipe": from_anywhere(prepared.recipe.model_dump(mode="json")),
        "recipe_file": str(recipe_path) if recipe_path else None,
        "base_folder": str(prepared.folder.resolve()),
        "base_fingerprint": fingerprint(prepared.folder),
        "choices": [
            {"key": choice.key, "value": choice.value, "reason": choice.reason}
            for choice in prepared.choices
        ],
        "versions": versions(),
        "device": {
            "kind": facts.kind,
            "name": facts.name,
            "capacity_bytes": facts.capacity_bytes,
            "capability": facts.capability,
        },
    }


def describe_tensors(loaded: LoadedModel) -> list[dict[str, Any]]:
    """For each kind of tensor: how many, how it is held, and why."""
    kinds: Counter[tuple[str, str, str]] = Counter()
    for path, module in loaded.model.named_modules():
        kind = ".".join("*" if part.isdigit() else part for part in path.split("."))
        kind = kind.removesuffix(".base")
        if isinstance(module, QuantLinear):
            kinds[kind, *_held(module, path == loaded.family.head)] += 1
        elif isinstance(module, FrozenEmbedding | HostEmbedding):
            kinds[kind, *_table(module, module.weight is loaded.head.weight)] += 1
        elif "lora" not in kind and list(module.parameters(recurse=False)):
            parameter = next(module.parameters(recurse=False))
            kinds[kind, _name(parameter), "a vector or trained in full; too small to pack"] += 1
    return [
        {"tensors": kind, "count": count, "held": weight_format, "reason": reason}
        for (kind, weight_format, reason), count in kinds.items()
    ]


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def set_status(run: RunFolder, status: str, **more: Any) -> None:
    """Changes run.json's status: running | done | interrupted | failed."""
    run.write(run.read() | {"status": status, **more})


def from_anywhere(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its files' absolute paths, so that the run can be judged from any folder."""
    data = {key: _absolute(recipe["data"][key]) for key in ("train", "eval")}
    return recipe | {"data": recipe["data"] | data}


def _absolute(where: str | None) -> str | None:
    path = None if where is None else Path(where).expanduser()
    return where if path is None or not path.exists() else str(path.absolute())


def _table(table: FrozenEmbedding | HostEmbedding, is_head: bool) -> tuple[str, str]:
    reason = "a table: rows are looked up, not multiplied; packing it costs accuracy"
    weight_format = _name(table.weight)
    if isinstance(table, HostEmbedding):
        return f"{weight_format} on the host", f"{reason}; only the rows looked up move to the card"
    if is_head and table.weight.device.type != "cpu":
        reason += "; on the card, because it is the head too, which multiplies by all of it"
    return weight_format, reason


def _held(layer: QuantLinear, is_head: bool) -> tuple[str, str]:
    weight_format = layer.weight_format
    if is_head:
        return _name(layer.weight), "the head: its errors reach every logit directly"
    if weight_format.bits == 4:
        twice = " with double quantization" if weight_format.double_quant else ""
        return f"{weight_format.quant_type}{twice}", "a linear of a block, frozen"
    if weight_format.bits == 8:
        return "int8", "a linear of a block, frozen"
    return _name(layer.weight), "base.bits is 16"


def _name(tensor: Any) -> str:
    return dtype_name(tensor.dtype)
