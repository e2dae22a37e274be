"""Measures the factor that a model's token table multiplies its rows by (Gemma, BART)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import ModelError
from qlora_cli.models.coverage import check_embedding
from qlora_cli.models.registry import unsupported

_ROWS, _WIDTH = 4, 8


def is_plain_table(module: nn.Module, path: str) -> bool:
    """Return whether `module` is an nn.Embedding that returns the rows of its weight."""
    try:
        check_embedding(module, path)
    except ModelError:
        return False
    return True


def measured_scale(model: Any, path: str, buffers: Mapping[str, Tensor | None]) -> float:
    """Return the factor by which the token table of a model on meta multiplies its rows.

    A norm that the rows pass through afterwards is not part of it.

    path: of the table. buffers: path -> value of the model's buffers. Raises ModelError if the
    table computes something else.
    """
    table = model.get_submodule(path)
    if is_plain_table(table, path):
        return 1.0
    if not isinstance(table, nn.Embedding):
        raise unsupported(model.config, f"its token table is a {type(table).__name__}")
    norm = norm_of_table(table)
    own = {name: buffers.get(f"{path}.{name}", old) for name, old in table._buffers.items()}
    parts: dict[str, nn.Module | None] = {} if norm is None else {norm: nn.Identity()}
    factor = _rows(table, own, parts, torch.ones(_ROWS, _WIDTH, device="cpu"))[0, 0].item()
    dtype = table.weight.dtype
    weight = torch.linspace(-2, 2, _ROWS * _WIDTH, device="cpu").view(_ROWS, _WIDTH).to(dtype)
    found = _rows(table, own, parts, weight)
    # Some classes round the factor to the dtype of the table before they multiply.
    for scale in (factor, torch.tensor(factor, device="cpu").to(dtype).item()):
        if torch.equal(weight * scale, found):
            return scale
    raise unsupported(model.config, f"{path} computes more than a factor times its rows")


def norm_of_table(table: nn.Module) -> str | None:
    """Return the name of the only part of a token table, a norm that its rows pass through."""
    names = list(table._modules)
    return names[0] if len(names) == 1 and isinstance(table, nn.Embedding) else None


def _rows(
    table: nn.Embedding,
    buffers: Mapping[str, Tensor | None],
    parts: Mapping[str, nn.Module | None],
    weight: Tensor,
) -> Tensor:
    """Return what the table's forward method returns for all rows of `weight`.

    parts: in place of the table's own ones.
    """
    toy = copy.copy(table)
    parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    # A row with the index `padding_idx` is a row like any other in inference.
    toy.__dict__.update(_parameters=parameters, _buffers=dict(buffers), padding_idx=None)
    toy.__dict__["_modules"] = dict(parts)
    with torch.no_grad():
        found: Tensor = toy(torch.arange(len(weight), device="cpu"))
    return found
