"""A checkpoint folder's tensors under the parameter names of a model family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qlora_cli.files.source import FolderSource, InitializedSource, TensorSource
from qlora_cli.models.classifier import initial_head
from qlora_cli.models.family import Family


def open_source(folder: Path, family: Family) -> FolderSource:
    """Open the tensors of a checkpoint folder; none is read yet.

    Of a classifier's checkpoint the tensors of other heads are left out, and so are those of a
    classification head of another shape. Raises ModelError if files are missing or damaged.
    """
    rename = family.rename or _adds_prefix(family)
    if family.is_classifier:
        return FolderSource(folder, rename, family.ignored, partial(_is_of_classifier, family))
    return FolderSource(folder, rename, ignored=family.ignored)


def _is_of_classifier(family: Family, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of a checkpoint is one of the classifier's."""
    if name in family.classifier.shapes:
        return family.classifier.shapes[name] == shape
    prefix = f"{family.backbone}."
    return name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")


def with_new_head(source: FolderSource, family: Family, config: Any, seed: int) -> TensorSource:
    """Return a source that also has the parameters of a classification head that are in no file.

    config: transformers' config of the base. seed: of their random initial values.
    """
    if not family.is_classifier:
        return source
    return InitializedSource(source, initial_head(family, config, seed))


def _adds_prefix(family: Family) -> Callable[[str], str]:
    """Return the function that adds the backbone's prefix if a name of a file lacks it."""
    prefix = f"{family.backbone}."

    def rename(name: str) -> str:
        return name if name.startswith((prefix, f"{family.head}.")) else prefix + name

    return rename
