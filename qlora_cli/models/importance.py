"""The file of the mean squares of the inputs of linears, for `base.scales: measured`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import ModelError, Problem, RecipeError
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.files.paths import user_path
from qlora_cli.files.safetensors_io import (
    TensorSpec,
    bytes_of,
    is_finite,
    read_header,
    read_tensor,
    write_tensors,
)
from qlora_cli.memory.scopes import unallocated
from qlora_cli.nn.site import Site

KEY = "base.importance"
_DIGEST = "sha256"
_HINT = "set base.importance to null, so that a new run measures it again"


def write_importance(file: Path, squares: Mapping[str, Tensor]) -> None:
    """Write the mean squares of the inputs of each linear.

    squares: path of the linear -> (in,) float32. Raises QloraError if the file cannot be written.
    """
    specs = {path: TensorSpec(torch.float32, tuple(value.shape)) for path, value in squares.items()}
    metadata = {_DIGEST: importance_digest(squares)}
    with report_write_errors("the inputs' mean squares", file), atomic_file(file) as partial:
        write_tensors(partial, specs, lambda path: squares[path], metadata)


def read_importance(file: str) -> Mapping[str, Tensor]:
    """Return what `write_importance` wrote. Raises ModelError if the file is missing or damaged."""
    path = user_path(file)
    if not path.is_file():
        raise ModelError(f"{KEY} names a file that does not exist", where=file, hint=_HINT)
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _read(path: Path, *_: int) -> Mapping[str, Tensor]:
    """Return the content of a file, once for its time and size: each dry run of a plan needs it."""
    # They stay in host memory, 4 bytes for each input of a linear, and the plan does not have them.
    with unallocated():
        entries, metadata = read_header(path)
        squares = {name: read_tensor(entry) for name, entry in entries.items()}
        if not _is_valid(squares) or metadata.get(_DIGEST) != importance_digest(squares):
            raise ModelError("its content does not match its checksum", where=str(path), hint=_HINT)
    return squares


def _is_valid(squares: Mapping[str, Tensor]) -> bool:
    return all(
        value.dtype == torch.float32 and value.dim() == 1 and is_finite(value)
        for value in squares.values()
    )


def check_importance(squares: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
    """Raise RecipeError unless the inputs of each linear of a base were measured.

    sites: the linears that can be quantized.
    """
    wrong = [
        site.path
        for site in sites
        if site.path not in squares or len(squares[site.path]) != site.in_features
    ]
    if wrong:
        raise RecipeError(
            f"{KEY} was measured on another base",
            [Problem(KEY, f"it has no inputs of {path}") for path in wrong[:3]],
            hint=_HINT,
        )


def importance_digest(squares: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the mean squares of all linears."""
    digest = hashlib.sha256()
    for path in sorted(squares):
        digest.update(path.encode() + bytes_of(squares[path]))
    return digest.hexdigest()
