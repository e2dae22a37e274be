"""What a transformers config states about single blocks, and configs of fewer blocks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from qlora_cli.files.composed import text_config_of
from qlora_cli.files.dtype import file_dtype
from qlora_cli.models.base_format import base_format_of, matches
from qlora_cli.models.build import skeleton
from qlora_cli.models.depth import num_blocks, set_num_blocks
from qlora_cli.models.derive_blocks import structure_of
from qlora_cli.models.family import Family
from qlora_cli.models.registry import known_family
from qlora_cli.models.sites import find_sites, find_stacks
from qlora_cli.nn.site import Site
from qlora_cli.plan.block_groups import BlockGroups, find_groups
from qlora_cli.recipe.base import SHARD, Bits
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of


def groups_of(recipe: Recipe, config: Any) -> BlockGroups | None:
    """Return the groups of blocks that recipe and config treat the same; None if there are none."""
    targets = recipe.adapter.targets
    are_roles = isinstance(targets, str) or not any("." in target for target in targets)
    # Blocks that use the keys and values of earlier ones depend on the number of blocks.
    if not are_roles or getattr(config, "num_kv_shared_layers", None):
        return None
    kinds = _settings_of_blocks(config)
    if known_family(config) is None:
        model, family = skeleton(config, torch.float32, task_of(recipe).model_class)
        blocks: Any = model.get_submodule(family.blocks)
        if len(blocks) != len(kinds):  # ALBERT computes one block several times.
            return None
        kinds = [f"{kind} {sorted(structure_of(b))}" for kind, b in zip(kinds, blocks, strict=True)]
    if recipe.base.overrides:
        formats = _formats_of_blocks(recipe, config)
        kinds = [f"{kind} {formats.get(index)}" for index, kind in enumerate(kinds)]
    found = find_groups(kinds)
    is_sharded = recipe.base.residency == SHARD
    return found if found is None else replace(found, is_sharded=is_sharded)


def _formats_of_blocks(recipe: Recipe, config: Any) -> dict[int, list[int]]:
    """Return the number of a block -> bits of each of its linears and stacks of experts.

    Raises RecipeError if a pattern of `base.overrides` matches no linear of the complete model.
    """
    sites, family = _sites_of(recipe, config)
    base_format = base_format_of(recipe, file_dtype(config))
    base_format.check(sites)
    found: dict[int, list[int]] = {}
    for site in sites:
        block = int(site.path.removeprefix(f"{family.blocks}.").partition(".")[0])
        found.setdefault(block, []).append(base_format.of(site).bits)
    return found


def matched_overrides(recipe: Recipe, config: Any) -> dict[str, Bits]:
    """Return the entries of `base.overrides` that match a linear of the model of `config`.

    It has fewer blocks than the recipe's, and all entries matched a linear of that.
    """
    if not recipe.base.overrides:
        return {}
    sites, _ = _sites_of(recipe, config)
    overrides = recipe.base.overrides.items()
    return {name: bits for name, bits in overrides if any(matches(name, site) for site in sites)}


def _sites_of(recipe: Recipe, config: Any) -> tuple[list[Site], Family]:
    """Return every linear and stack of experts of the model of `config`, and its family."""
    model, family = skeleton(config, torch.float32, task_of(recipe).model_class)
    return [*find_sites(model, family, text_config_of(model)), *find_stacks(model, family)], family


def with_blocks(config: Any, number: int) -> Any:
    """Return a copy of a transformers config with the first `number` blocks only."""
    shorter = deepcopy(config)
    set_num_blocks(shorter, number)
    for key, values in _per_layer(config).items():
        setattr(shorter, key, values[:number])
    if overrides := _overrides(config):
        shorter.per_layer_config = {i: v for i, v in overrides.items() if i < number}
    return shorter


def num_kinds_prefix(config: Any) -> int:
    """Return the smallest number of first blocks that contain a block of every kind."""
    kinds = _settings_of_blocks(config)
    return max(kinds.index(kind) for kind in kinds) + 1


def _settings_of_blocks(config: Any) -> list[str]:
    """Return the settings of each block that may differ between blocks."""
    overrides, per_layer = _overrides(config), _per_layer(config).values()
    return [
        repr([*(values[index] for values in per_layer), overrides.get(index)])
        for index in range(num_blocks(config))
    ]


def _overrides(config: Any) -> dict[int, Any]:
    """Return the number of a block -> settings that only this block has."""
    overrides = config.to_dict().get("per_layer_config") or {}
    return {int(index): settings for index, settings in overrides.items()}


def _per_layer(config: Any) -> dict[str, Sequence[Any]]:
    """Return the settings of a config that have one value per block."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == num_blocks(config)
    }
