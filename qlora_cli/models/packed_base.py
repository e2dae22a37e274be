"""Finds the packed copy of a base in the cache by everything that its bytes depend on."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.bitsandbytes_weights import with_weights
from qlora_cli.files.cache import PACKED, entries, entry_folder, key_of
from qlora_cli.files.dtype import dtype_name, file_dtype
from qlora_cli.files.packed_entry import PackedEntry
from qlora_cli.files.packed_store import PackedStore
from qlora_cli.files.quantized import BITSANDBYTES, stored_as
from qlora_cli.files.source import config_digest, fingerprint, read_folder, weights_bytes
from qlora_cli.models.base_format import BaseFormat, base_format_of
from qlora_cli.models.importance import importance_digest
from qlora_cli.nn.packed_tensors import is_in_format
from qlora_cli.recipe.adapter import PISSA
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import MIB

MIN_BYTES = 64 * MIB
"""Size of a checkpoint from which on `base.cache: auto` keeps it; less is packed in seconds."""
_LAYOUT = 1
"""Version of the files of a packed base."""
_PACKAGES = ("qlora-cli", "torch", "bitsandbytes", "transformers")
_CODE = ("files", "models", "nn")
"""Folders of this package whose code decides which bytes a tensor becomes."""


def packed_store(
    recipe: Recipe, folder: Path, config: Any, model_class: Any, kind: str, observer: Observer
) -> PackedStore | None:
    """Return the packed copy of a recipe's base; None if `base.cache` keeps none.

    recipe: resolved, without `auto`. folder, config: of the base. model_class: of the task. kind:
    cpu or cuda, the kind of the device that packs; others may round a tie between two codes
    differently. observer: receives notes. Raises ModelError if the base is damaged, UsageError if
    the limit of the size is not a size.
    """
    changes_base = recipe.adapter.method == "full" or recipe.adapter.init == PISSA
    if changes_base or not _is_kept(recipe, folder):
        return None
    base_format = base_format_of(recipe, file_dtype(config))
    base = fingerprint(folder)
    parts = {
        "layout": _LAYOUT,
        "base": base,
        "config": config_digest(folder),
        "format": [_name(base_format), *map(dtype_name, _dtypes(base_format))],
        "overrides": base_format.overrides,
        "scales": [base_format.default.scales, importance_digest(base_format.importance)],
        "model": model_class.__name__,
        "kind": kind,
        "versions": {name: version(name) for name in _PACKAGES},
        "code": _code_digest(),
    }
    digest = base.rpartition(":")[2]
    key = f"{digest[:16]}-{_name(base_format)}-{key_of(parts)[:16]}"
    description = f"{recipe.model.name} in {_name(base_format)} for {kind}"
    return PackedStore(entry_folder(PACKED, key), description, observer)


def has_packed_copy(recipe: Recipe, folder: Path, config: Any, model_class: Any, kind: str) -> bool:
    """Return whether a job would load the recipe's base without packing it.

    That is from a packed copy, or from a checkpoint that contains the packed weights. The arguments
    are those of `packed_store`. The base's files may be absent; weights are not read if the cache
    contains no packed base at all.
    """
    if stored_as(config) == BITSANDBYTES and _is_stored(recipe, folder, config):
        return True
    if not any(entry.kind == PACKED for entry in entries()):
        return False
    with suppress(ModelError):
        store = packed_store(recipe, folder, config, model_class, kind, Silent())
        return store is not None and store.exists()
    return False


def _is_stored(recipe: Recipe, folder: Path, config: Any) -> bool:
    """Return whether the checkpoint contains the weights in the format of the recipe."""
    base_format = base_format_of(recipe, file_dtype(config))
    # Some linears are quantized again.
    if base_format.overrides or base_format.default.scales != "absmax":
        return False
    with suppress(ModelError):
        entries = with_weights(read_folder(folder)).values()
        stored = next((e.stored_format() for e in entries if isinstance(e, PackedEntry)), None)
        return stored is not None and is_in_format(base_format.default, stored)
    return False


def _is_kept(recipe: Recipe, folder: Path) -> bool:
    """Return whether `base.cache` keeps the base in a folder."""
    if recipe.base.residency == "disk":
        return True
    if recipe.base.cache == "auto":
        # The copy of a 16-bit base would be as large as the base.
        return min(recipe.base.all_bits) < 16 and weights_bytes(folder) >= MIN_BYTES
    return recipe.base.cache


def _name(base_format: BaseFormat) -> str:
    default = base_format.default
    name = "int8" if default.bits == 8 else "16bit"
    if default.bits == 4:
        name = f"{default.quant_type}{'-nested' if default.double_quant else ''}"
        name += "" if default.scales == "absmax" else f"-{default.scales}"
    return f"{name}-mixed" if base_format.overrides else name


def _dtypes(base_format: BaseFormat) -> tuple[Any, Any]:
    """Return the dtypes of the tensors that are not quantized."""
    return base_format.compute, base_format.storage


@cache
def _code_digest() -> str:
    """Return a SHA-256 over the code that decides which bytes a tensor becomes."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in _CODE:
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
