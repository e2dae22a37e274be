"""Finds the modules of a model that its family describes."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_cli.errors import ModelError
from qlora_cli.models.family import Family, LinearSpec, MlpSpec
from qlora_cli.nn.site import Site


def find_sites(model: nn.Module, family: Family, config: Any) -> list[Site]:
    """Return every linear of every block, in the model's order.

    Raises ModelError if the model does not have one of the linears.
    """
    blocks: Any = model.get_submodule(family.blocks)
    return [
        _site(model, f"{family.blocks}.{index}.{spec.path}", spec, config)
        for index in range(len(blocks))
        for spec in family.linears
    ]


def norm_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of all RMSNorms that the family describes, in the model's order."""
    blocks: Any = model.get_submodule(family.blocks)
    paths = [
        f"{family.blocks}.{index}.{path}" for index in range(len(blocks)) for path in family.norms
    ]
    return paths if family.final_norm is None else [*paths, family.final_norm]


def mlp_paths(model: nn.Module, blocks: str, mlp: MlpSpec) -> list[str]:
    """Return the paths of the MLPs of all blocks. blocks: path of the list of blocks."""
    num_blocks = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    return [f"{blocks}.{index}.{mlp.path}" for index in range(num_blocks)]


def _site(model: nn.Module, path: str, spec: LinearSpec, config: Any) -> Site:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as missing:
        raise ModelError(f"the model has no linear {path}", where="model.name") from missing
    shape = tuple(module.weight.shape)
    out_features, in_features = reversed(shape) if spec.transposed else shape
    rows = dict(spec.rows(config)) if spec.rows else {spec.roles[0]: slice(0, out_features)}
    return Site(
        path=path,
        roles=spec.roles,
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bias=module.bias is not None,
        transposed=spec.transposed,
    )
