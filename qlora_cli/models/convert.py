"""Turns a transformers model on `meta` into ours: packed linears, adapters, tables, norms, MLPs.

Nothing is loaded here. What comes out has a place for every tensor of the checkpoint, and
`weights/build.py` fills these places one by one. The same surgery serves the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.errors import Problem, ProblemsError
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.nn.mlp import ACTIVATIONS, Mlp, Projections
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.nn.quant import QuantLinear, WeightFormat
from qlora_cli.nn.site import Site


def adapted_roles(sites: Sequence[Site], targets: str | Sequence[str]) -> dict[str, list[str]]:
    """Each targeted site's path -> the roles of it that are adapted, in the site's own order.

    targets: `all`, or role names and exact module paths. Raises ProblemsError naming every target
    that is not there.
    """
    known = {role for site in sites for role in site.roles}
    paths = {site.path for site in sites}
    wanted = known if targets == "all" else set(targets)
    unknown = sorted(wanted - known - paths)
    if unknown:
        ordered = list(dict.fromkeys(role for site in sites for role in site.roles))
        raise ProblemsError(
            "unknown adapter targets",
            [
                Problem("adapter.targets", f"{name!r} is no role and no linear's path")
                for name in unknown
            ],
            hint=f"roles of this model: {', '.join(ordered)}; a path looks like {sites[0].path}",
        )
    chosen = {
        site.path: list(site.roles)
        if site.path in wanted
        else [r for r in site.roles if r in wanted]
        for site in sites
    }
    return {path: roles for path, roles in chosen.items() if roles}


def install(
    model: nn.Module,
    sites: Sequence[Site],
    weight_format: WeightFormat,
    adapted: Mapping[str, Sequence[str]],
    settings: LoraSettings,
) -> None:
    """Replaces every site's module by a packed one, adapted where `adapted` says so."""
    for site in sites:
        packed = QuantLinear(site.in_features, site.out_features, site.bias, weight_format)
        roles = adapted.get(site.path, ())
        parts = {role: site.rows[role] for role in roles}
        replace(model, site.path, LoraLinear(packed, parts, settings) if parts else packed)


def install_tables(
    model: nn.Module, tables: Sequence[str], head: str, weight_format: WeightFormat
) -> None:
    """Embeddings and head keep 16-bit storage."""
    for path in tables:
        weight: Any = model.get_submodule(path).weight
        replace(
            model,
            path,
            FrozenEmbedding(weight.detach().to(weight_format.storage), weight_format.compute),
        )
    old: Any = model.get_submodule(head)
    bias = old.bias is not None
    plain = QuantLinear(
        old.in_features, old.out_features, bias, weight_format.plain(), category="head"
    )
    replace(model, head, plain)


def keep_on_host(model: nn.Module, table: str, device: torch.device) -> None:
    """Leaves an installed table in the host's memory; its rows come to `device`."""
    installed = model.get_submodule(table)
    assert isinstance(installed, FrozenEmbedding)
    replace(model, table, HostEmbedding(installed, device))


def install_norms(model: nn.Module, paths: Sequence[str]) -> None:
    """RMSNorms that keep no float32 copy of their input."""
    for path in paths:
        old: Any = model.get_submodule(path)
        replace(model, path, RmsNorm(old.weight, old.variance_epsilon))


def install_mlps(
    model: nn.Module, paths: Sequence[str], names: Projections, activation: str
) -> None:
    """MLPs that compute again what lies between their linears; behind `install`.

    A model with an activation that has no gradient here keeps its own.
    """
    if activation in ACTIVATIONS:
        for path in paths:
            replace(model, path, Mlp(model.get_submodule(path), names, ACTIVATIONS[activation]))


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where `path` leads."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def checkpoint_blocks(model: Any, preserve_random_state: bool) -> None:
    """Each block keeps its input only and computes the rest again in backward.

    preserve_random_state: needed where the adapter drops inputs, a cost where it does not.
    """
    settings = {
        "use_reentrant": False,
        "preserve_rng_state": preserve_random_state,
        "determinism_check": "none",
    }
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def linear_paths(block: nn.Module) -> list[str]:
    """Every module in a block with a two-dimensional weight, for the error on unknown families."""
    return [
        path
        for path, module in block.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    ]
