"""A checkpoint folder's tensors under the parameter names of a model family."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.files.source import FolderSource
from qlora_cli.models.family import Family


def open_source(folder: Path, family: Family) -> FolderSource:
    """Open the tensors of a checkpoint folder; none is read yet.

    Raises ModelError if files are missing or damaged.
    """
    return FolderSource(
        folder, prefix=f"{family.backbone}.", head=family.head, ignored=family.ignored
    )
