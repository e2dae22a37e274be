"""Finds in a model the modules that a family's spec names."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_cli.errors import ModelError
from qlora_cli.models.family import Family, LinearSpec, MlpSpec
from qlora_cli.nn.site import Site


def find_sites(model: nn.Module, family: Family, config: Any) -> list[Site]:
    """Every linear of every block, in the model's order. Raises ModelError for a missing one."""
    blocks: Any = model.get_submodule(family.blocks)
    return [
        _site(model, f"{family.blocks}.{index}.{spec.path}", spec, config)
        for index in range(len(blocks))
        for spec in family.linears
    ]


def norm_paths(model: nn.Module, family: Family) -> list[str]:
    """Every RMSNorm that the family names, in the model's order."""
    blocks: Any = model.get_submodule(family.blocks)
    found = [
        f"{family.blocks}.{index}.{path}" for index in range(len(blocks)) for path in family.norms
    ]
    return found if family.final_norm is None else [*found, family.final_norm]


def mlp_paths(model: nn.Module, blocks: str, mlp: MlpSpec) -> list[str]:
    """The MLP of every block in the list at `blocks`."""
    num_blocks = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    return [f"{blocks}.{index}.{mlp.path}" for index in range(num_blocks)]


def _site(model: nn.Module, path: str, spec: LinearSpec, config: Any) -> Site:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as missing:
        raise ModelError(f"no linear {path} in this model", where="model.name") from missing
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
