"""Finds the modules of a model that its family describes."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_cli.adapters.targets import EXPERTS
from qlora_cli.errors import ModelError
from qlora_cli.models.family import Family, LinearSpec, MlpSpec
from qlora_cli.nn.site import Site


def find_sites(model: nn.Module, family: Family, config: Any) -> list[Site]:
    """Return every linear of every block that the family describes, in the model's order.

    A linear that several blocks share is returned once. Raises ModelError if a block lacks one of
    the linears, unless the family's blocks differ.
    """
    blocks: Any = model.get_submodule(family.blocks)
    sites = [
        _site(block, f"{family.blocks}.{index}", spec, config)
        for index, block in enumerate(blocks)
        for spec in _linears_of(block, family)
    ]
    return [site for site in sites if site.path not in family.shared]


def _linears_of(block: nn.Module, family: Family) -> list[LinearSpec]:
    """Return the linears of one block, in its order."""
    if not family.blocks_differ:
        return list(family.linears)
    specs = {spec.path: spec for spec in family.linears}
    return [specs[path] for path, _ in block.named_modules() if path in specs]


def norm_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of all RMSNorms that the family describes, in the model's order."""
    paths = [path for name in family.norms for path in _in_blocks(model, family, name)]
    return paths if family.final_norm is None else [*paths, family.final_norm]


def experts_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of the modules with experts."""
    return [path for name in family.experts for path in _in_blocks(model, family, name)]


def mixer_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of the modules that compute one row at a time."""
    return [path for name in family.rows.mixers for path in _in_blocks(model, family, name)]


def find_stacks(model: nn.Module, family: Family) -> list[Site]:
    """Return every stacked parameter of experts of transformers' model, in the model's order."""
    found: list[Site] = []
    for path in experts_paths(model, family):
        module: Any = model.get_submodule(path)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                sizes = parameter.shape[:0:-1] if module.is_transposed else parameter.shape[1:]
                found.append(_stack(f"{path}.{key}", module, *sizes))
    return found


def _stack(path: str, module: Any, out_features: int, in_features: int) -> Site:
    rows = {EXPERTS: slice(0, out_features)}
    return Site(
        path=path,
        roles=(EXPERTS,),
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bias=False,
        transposed=module.is_transposed,
        num_experts=module.num_experts,
    )


def mlp_paths(model: nn.Module, family: Family, mlp: MlpSpec) -> list[str]:
    """Return the paths of the MLPs of all blocks."""
    down = f"{mlp.path}.{mlp.projections.down}"
    return [path.rpartition(".")[0] for path in _in_blocks(model, family, down)]


def _in_blocks(model: nn.Module, family: Family, path: str) -> list[str]:
    """Return the paths of the module at `path` in all blocks, or in those that have it."""
    blocks: Any = model.get_submodule(family.blocks)
    return [
        f"{family.blocks}.{index}.{path}"
        for index, block in enumerate(blocks)
        if not family.blocks_differ or path in dict(block.named_modules())
    ]


def _site(block: nn.Module, block_path: str, spec: LinearSpec, config: Any) -> Site:
    path = f"{block_path}.{spec.path}"
    try:
        module: Any = block.get_submodule(spec.path)
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
