"""Replaces the modules of a model with a frozen base by this package's layers, and wraps adapters.

`convert.py` replaces modules of one kind; here is which ones, and in which order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.registry import method_of
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.sites import find_stacks, mlp_paths, norm_paths
from qlora_cli.models.tying import share_modules
from qlora_cli.nn.embedding import has_own_memory
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe.schema import Recipe


def replace_modules(loaded: LoadedModel, recipe: Recipe, device: torch.device) -> None:
    """Replace the modules of a model whose base is frozen, and wrap the adapted linears.

    loaded: on meta. device: of the weights that are loaded later.
    """
    method = method_of(recipe.adapter)
    model, family, base_format = loaded.model, loaded.family, loaded.base_format
    loaded.stacks = find_stacks(model, family)
    loaded.adapted = method.adapted_roles([*loaded.sites, *loaded.stacks])

    def wrap(linear: QuantLinear, site: Site) -> nn.Module:
        roles = loaded.adapted.get(site.path)
        return method.wrap(linear, {role: site.rows[role] for role in roles}) if roles else linear

    convert.replace_linears(model, loaded.sites, base_format, wrap)
    share_modules(model, family.shared)
    convert.replace_experts(model, family, loaded.stacks, base_format)
    for stack in loaded.stacks:
        if stack.path in loaded.adapted:
            packed: Any = model.get_submodule(stack.path)
            convert.replace_module(model, stack.path, method.wrap_stack(packed))
    convert.replace_embeddings(model, family, base_format.default)
    if not family.is_classifier:
        convert.replace_head(model, family.head, base_format.default)
    _move_tables_to_host(loaded, recipe, device)
    convert.replace_norms(model, norm_paths(model, family))
    share_modules(model, family.shared)
    if family.mlp is not None:
        activation = getattr(loaded.config, family.mlp.activation)
        paths = mlp_paths(model, family, family.mlp)
        convert.replace_mlps(model, paths, family.mlp.projections, activation)
    if family.attention is not None:
        convert.share_attention_inputs(model.get_submodule(family.blocks), family.attention)


def _move_tables_to_host(loaded: LoadedModel, recipe: Recipe, device: torch.device) -> None:
    """Store the token table and the head in host memory where that saves memory of the device."""
    model, family = loaded.model, loaded.family
    is_streamed = recipe.base.is_streamed
    # A tied table is also the head, and every step multiplies by all of it.
    if is_streamed or (has_own_memory(device) and not is_tied(loaded)):
        convert.move_embedding_to_host(model, family.token_embedding, device)
    # The head of a classifier is trained, and small.
    if is_streamed and not family.is_classifier:
        convert.move_head_to_host(model, family.head, device)
