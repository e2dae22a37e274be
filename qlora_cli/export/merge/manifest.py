"""Read merge.json, the record of how a merged folder was created.

merge.json has a section `settings` with everything that decides the bytes of the tensors, and, for
the reader, how the base and the dtype were chosen (`merge_settings.py`). Only `settings` is read
back, so a merge.json of an older version stays readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from qlora_cli.errors import ModelError
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.options import MERGE_BASES, MergeBase
from qlora_cli.files.atomic import read_json
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.recipe.schema import DataFormat

MANIFEST = "merge.json"
"""Name of the record in a merged folder."""


@dataclass(frozen=True)
class MergeManifest:
    """How a merged folder was created.

    base, dtype: as in `MergedTensors`.
    weight: factor of the run's own adapter.
    others: folders of the other merged adapters, and their factors.
    digests: SHA-256 of the run's adapter and of the others; empty if no adapter was merged.
    settings: the section `settings` of merge.json; None if the folder has no merge.json.
    """

    base: MergeBase
    dtype: torch.dtype
    weight: float
    others: tuple[tuple[Path, float], ...]
    digests: tuple[str, ...]
    settings: dict[str, Any] | None

    @classmethod
    def read(cls, merged: Path) -> MergeManifest:
        """Return the manifest of a merged folder.

        A folder without merge.json is taken for a merge into the original base, in the dtype of its
        config.json. Raises ModelError if merge.json or config.json is damaged.
        """
        manifest = merged / MANIFEST
        if not manifest.is_file():
            dtype = read_json(merged / CONFIG, _config_dtype, ModelError)
            return cls("original", dtype, 1.0, (), (), None)
        return read_json(manifest, lambda content: cls._from(content["settings"]), ModelError)

    @classmethod
    def _from(cls, settings: dict[str, Any]) -> MergeManifest:
        base = settings["base"]
        assert base in MERGE_BASES, f"base is {base}"
        adapters = [(Path(a["folder"]), float(a["weight"])) for a in settings["adapters"]]
        (_, weight), *others = adapters or [(Path(), 1.0)]
        digests = tuple(str(a["digest"]) for a in settings["adapters"])
        return cls(base, torch_dtype(settings["dtype"]), weight, tuple(others), digests, settings)

    def notes(self) -> Iterator[str]:
        """Yield what a reader needs to understand a verification of this folder, line by line."""
        if self.settings is None:
            yield (
                f"the folder has no {MANIFEST}: it is compared with a merge into the original base"
            )
        if self.weight != 1.0 or self.others:
            others = (f" + {weight:g} x {folder}" for folder, weight in self.others)
            adapters = f"{self.weight:g} x the run's adapter" + "".join(others)
            yield f"{MANIFEST} lists {adapters}; the folder is compared with this sum"


def merged_step(merged: Path) -> int | None:
    """Return the step of the run's checkpoint that was merged.

    Returns None if the weights of a finished run were merged, or if merge.json does not have it.
    """
    step: int | None = _entry(merged, "step", lambda value: type(value) is int)
    return step


def trained_row_format(merged: Path) -> DataFormat | None:
    """Return the format of the rows that the merged run was trained on; None if not recorded."""
    formats = get_args(DataFormat)
    name: DataFormat | None = _entry(merged, "data_format", lambda value: value in formats)
    return name


def _entry(merged: Path, key: str, is_valid: Callable[[Any], bool]) -> Any:
    """Return a value of merge.json; None if there is none. Raises ModelError if it is damaged."""

    def value(content: dict[str, Any]) -> Any:
        found = content.get(key)
        assert found is None or is_valid(found), f"{key} has a wrong value"
        return found

    manifest = merged / MANIFEST
    return read_json(manifest, value, ModelError) if manifest.is_file() else None


def _config_dtype(config: dict[str, Any]) -> torch.dtype:
    return torch_dtype(config.get("dtype", "float32"))
