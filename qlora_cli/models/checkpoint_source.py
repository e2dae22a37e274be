"""A checkpoint folder's tensors under the parameter names of a model family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qlora_cli.files.source import FolderSource
from qlora_cli.models.family import Family


def open_source(folder: Path, family: Family) -> FolderSource:
    """Open the tensors of a checkpoint folder; none is read yet.

    Raises ModelError if files are missing or damaged.
    """
    return FolderSource(folder, family.rename or _adds_prefix(family), ignored=family.ignored)


def _adds_prefix(family: Family) -> Callable[[str], str]:
    """Return the function that adds the backbone's prefix if a name of a file lacks it."""
    prefix = f"{family.backbone}."

    def rename(name: str) -> str:
        return name if name.startswith((prefix, f"{family.head}.")) else prefix + name

    return rename
