"""How a merged folder says that it was made: its merge.json, read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.export.merge.folder import CONFIG, MANIFEST
from qlora_cli.export.merge.merged_tensors import MergeBase
from qlora_cli.files.atomic import read_json
from qlora_cli.files.dtype import torch_dtype


@dataclass(frozen=True)
class MergeManifest:
    """weight: of the run's own adapter. others: where further ones lie, and their weights.

    digests: of the run's adapter and the others; empty where no adapter was merged. settings: what
    decided every byte, as merging wrote it; None where the folder has no merge.json.
    """

    base: MergeBase
    dtype: torch.dtype
    weight: float
    others: tuple[tuple[Path, float], ...]
    digests: tuple[str, ...]
    settings: dict[str, Any] | None

    @classmethod
    def of(cls, merged: Path) -> MergeManifest:
        """Without a merge.json: into the original base, in the dtype of config.json.

        Raises ModelError where one of the two is damaged.
        """
        about = merged / MANIFEST
        if not about.is_file():
            dtype = read_json(merged / CONFIG, _dtype_of, ModelError)
            return cls("original", dtype, 1.0, (), (), None)
        return read_json(about, lambda content: cls._from(content["settings"]), ModelError)

    @classmethod
    def _from(cls, settings: dict[str, Any]) -> MergeManifest:
        base = settings["base"]
        assert base in ("original", "dequantized"), f"base is {base}"
        adapters = [(Path(a["folder"]), float(a["weight"])) for a in settings["adapters"]]
        (_, weight), *others = adapters or [(Path(), 1.0)]
        digests = tuple(str(a["digest"]) for a in settings["adapters"])
        return cls(base, torch_dtype(settings["dtype"]), weight, tuple(others), digests, settings)

    def notes(self) -> Iterator[str]:
        """What a reader of a verdict has to know of what was compared."""
        if self.settings is None:
            yield f"there is no {MANIFEST}: compared with a merge into the original base"
        if self.weight != 1.0 or self.others:
            more = (f" + {weight:g} x {folder}" for folder, weight in self.others)
            sum_told = f"{self.weight:g} x the run's adapter" + "".join(more)
            yield f"{MANIFEST} says that {sum_told} was merged, and that is what is compared"


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    return torch_dtype(config.get("dtype", "float32"))
