"""DoRA's magnitude vectors in an adapter's file: one for each adapted linear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_cli.adapters import peft_config, peft_names
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorEntry


def magnitude_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return path of a linear -> entry of its magnitude vector. entries: of the file, by name."""
    paths = {name: peft_names.parse_magnitude_name(name) for name in entries}
    return {path: entries[name] for name, path in paths.items() if path is not None}


def check_magnitudes(
    magnitudes: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, int]],
    config: PeftConfig,
    file: Path,
) -> None:
    """Raise ModelError unless every adapted linear of a DoRA adapter has its magnitudes.

    magnitudes: from `magnitude_entries`. shapes: path of an adapted linear -> (out, in).
    """
    if not config.use_dora or shapes.keys() != magnitudes.keys():
        raise ModelError(
            f"{len(magnitudes)} of {len(shapes)} layers have a magnitude vector, and "
            f"{peft_config.CONFIG} has use_dora: {str(config.use_dora).lower()}",
            where=str(file),
        )
    for path, entry in magnitudes.items():
        if entry.shape != shapes[path][:1] or not entry.dtype.is_floating_point:
            raise ModelError(
                f"{path}: the magnitude vector has shape {entry.shape} and {entry.dtype}, and the "
                f"weight has {shapes[path][0]} rows",
                where=str(file),
            )
