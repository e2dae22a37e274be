"""The content of `run.json`: recipe, choices and their reasons, versions, tensors, status."""

from __future__ import annotations

import platform
from collections import Counter
from glob import glob, has_magic
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_cli.data.template import read_template
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.paths import user_path
from qlora_cli.files.source import config_digest, fingerprint
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.runs.layout import RunFolder

_PACKAGES = ("qlora-cli", "torch", "bitsandbytes", "transformers", "accelerate", "safetensors")


def describe_run(job: TrainingJob, recipe_path: Path | None) -> dict[str, Any]:
    """Return the content of `run.json` before the base is loaded, with status `running`.

    recipe_path: the recipe's file, or None if there is none. Raises ModelError if the base's files
    are damaged.
    """
    prepared = job.prepared
    profile = prepared.profile
    return {
        "status": "running",
        "steps": job.steps,
        "recipe": with_absolute_paths(prepared.recipe.model_dump(mode="json")),
        "recipe_file": str(recipe_path) if recipe_path else None,
        "base_folder": str(prepared.folder.resolve()),
        "base_fingerprint": fingerprint(prepared.folder),
        "base_config": config_digest(prepared.folder),
        "data_digest": job.data_digest,
        "choices": [
            {"key": choice.key, "value": choice.value, "reason": choice.reason}
            for choice in prepared.choices
        ],
        "versions": versions(),
        "proof": None if prepared.proof is None else prepared.proof.to_dict(),
        "device": {
            "kind": profile.kind,
            "name": profile.name,
            "capacity_bytes": profile.capacity_bytes,
            "capability": profile.capability,
        },
    }


def describe_tensors(loaded: LoadedModel) -> list[dict[str, Any]]:
    """Return for each kind of tensor its number, its storage format and the reason for it.

    Tensors are of one kind if their paths differ only in the numbers of blocks.
    """
    kinds: Counter[tuple[str, str, str]] = Counter()
    for path, module in loaded.model.named_modules():
        kind = ".".join("*" if part.isdigit() else part for part in path.split("."))
        kind = kind.removesuffix(".base")
        if isinstance(module, QuantLinear):
            where = loaded.stream.weights.where if loaded.stream is not None else ""
            kinds[kind, *_linear_format(module, path == loaded.family.head, where)] += 1
        elif isinstance(module, HostHead):
            kinds[kind, *_host_head_format(module)] += 1
        elif isinstance(module, FrozenEmbedding | HostEmbedding):
            kinds[kind, *_table_format(module, module.weight is loaded.head.weight)] += 1
        elif "lora" not in kind and list(module.parameters(recurse=False)):
            parameter = next(module.parameters(recurse=False))
            reason = "a vector, or trained in full fine-tuning; not quantized"
            kinds[kind, dtype_name(parameter.dtype), reason] += 1
    return [
        {"tensors": kind, "count": count, "held": weight_format, "reason": reason}
        for (kind, weight_format, reason), count in kinds.items()
    ]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect a run's results."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def set_status(run: RunFolder, status: str, **more: Any) -> None:
    """Change the status in `run.json` and add the keys of `more`.

    status: running, done, interrupted or failed.
    """
    run.write(run.read() | {"status": status, **more})


def with_absolute_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with absolute paths of data files, and the text of its chat template.

    Both are valid in any folder.

    recipe: the dumped recipe. Values that name no existing file, such as hub ids, stay unchanged.
    """
    data = {key: _absolute(recipe["data"][key]) for key in ("train", "eval")}
    if recipe["data"].get("template"):
        data["template"] = read_template(recipe["data"]["template"])
    adapter = recipe["adapter"]
    if adapter.get("from"):
        adapter = adapter | {"from": _absolute(adapter["from"])}
    return recipe | {"data": recipe["data"] | data, "adapter": adapter}


def _absolute(where: Any) -> Any:
    """Return a value of `data.train` or `data.eval` with absolute paths."""
    if isinstance(where, list):
        return [_absolute(item) for item in where]
    if isinstance(where, dict):
        return where | {"path": _absolute(where["path"])}
    if not isinstance(where, str):
        return where
    path = user_path(where)
    is_local = path.exists() or bool(has_magic(where) and glob(str(path), recursive=True))
    return str(path.absolute()) if is_local else where


def _table_format(table: FrozenEmbedding | HostEmbedding, is_head: bool) -> tuple[str, str]:
    """Return (storage format, reason) of an embedding table."""
    reason = "a table: its rows are looked up, not multiplied; quantizing it reduces accuracy"
    weight_format = dtype_name(table.weight.dtype)
    if isinstance(table, HostEmbedding):
        return (
            f"{weight_format} {_host_place(table)}",
            f"{reason}; only the needed rows are copied to the GPU",
        )
    if is_head and table.weight.device.type != "cpu":
        reason += (
            "; on the GPU, because it is also the head, which multiplies by the complete table"
        )
    return weight_format, reason


def _host_place(table: HostEmbedding | HostHead) -> str:
    return "in CPU memory" if table.disk is None else "on disk"


def _host_head_format(head: HostHead) -> tuple[str, str]:
    """Return (storage format, reason) of a head in host memory."""
    return (
        f"{dtype_name(head.weight.dtype)} {_host_place(head)}",
        "the head: its errors affect every logit directly; the loss copies it in pieces",
    )


def _linear_format(layer: QuantLinear, is_head: bool, where: str) -> tuple[str, str]:
    """Return (storage format, reason) of a frozen linear layer. where: it is if it is streamed."""
    weight_format = layer.weight_format
    reason = "a frozen linear layer of a block"
    if not layer.weight.numel():
        reason += f", {where} while the block does not compute"
    if is_head:
        return dtype_name(layer.weight.dtype), "the head: its errors affect every logit directly"
    if weight_format.bits == 4:
        suffix = " with double quantization" if weight_format.double_quant else ""
        return f"{weight_format.quant_type}{suffix}", reason
    if weight_format.bits == 8:
        return "int8", reason
    return dtype_name(layer.weight.dtype), "base.bits or base.overrides is 16"
