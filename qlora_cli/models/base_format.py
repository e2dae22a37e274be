"""The storage format of every linear of a base: the one definition of "the bits of this linear".

`base.bits` is the default, and `base.overrides` are exceptions by module name or role. Loading, the
plan, the packed copy, merging and verification all ask a `BaseFormat`, made from the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.models.importance import read_importance
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.recipe.schema import Recipe

KEY = "base.overrides"


@dataclass(frozen=True)
class BaseFormat:
    """The format of every linear of a base.

    default: format of a linear without an exception; its dtypes are those of the complete model.
    overrides: (pattern, bits), in the recipe's order. Of several matching patterns the last counts.
    A pattern is a role, such as `down`, or a glob of a module's path, such as `*.down_proj`. It
    may match stacks of experts, too. importance: path of a linear -> mean squares of its inputs,
    for scales `measured`; empty in a plan.
    """

    default: WeightFormat
    overrides: tuple[tuple[str, int], ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def of(self, site: Site) -> WeightFormat:
        """Return the format of a linear, or of a stack of experts."""
        bits = [bits for pattern, bits in self.overrides if matches(pattern, site)]
        own = replace(self.default, bits=bits[-1]) if bits else self.default
        if not self.importance:
            return own
        if site.path in self.importance:
            return replace(own, importance=self.importance[site.path])
        # Stacks of experts are not measured: each expert has other inputs.
        return replace(own, scales="search")

    @property
    def compute(self) -> torch.dtype:
        """Return the dtype of activations and of dequantized weights."""
        return self.default.compute

    @property
    def storage(self) -> torch.dtype:
        """Return the dtype of 16-bit weights."""
        return self.default.storage

    @property
    def is_quantized(self) -> bool:
        """Return whether any linear may have fewer than 16 bits."""
        return min(self._all_bits) < 16

    @property
    def text(self) -> str:
        """Return the bits as text: `4-bit`, or `mixed 4- and 8-bit`."""
        first, *others = sorted(self._all_bits)
        if not others:
            return f"{first}-bit"
        return "mixed " + " and ".join(f"{bits}-" for bits in (first, *others)) + "bit"

    @property
    def _all_bits(self) -> set[int]:
        return {self.default.bits, *(bits for _, bits in self.overrides)}

    def check(self, sites: Sequence[Site]) -> None:
        """Raise RecipeError that names every pattern without a match in the complete model.

        sites: all linears, and the stacks of experts.
        """
        unknown = [
            pattern for pattern, _ in self.overrides if not any(matches(pattern, s) for s in sites)
        ]
        if not unknown:
            return
        roles = list(dict.fromkeys(role for site in sites for role in site.roles))
        raise RecipeError(
            f"{KEY} has patterns that match no linear of the model",
            [Problem(KEY, f"{pattern!r} matches nothing") for pattern in unknown],
            hint=f"roles of this model: {', '.join(roles)}; example of a name: {sites[0].path}",
        )


def matches(pattern: str, site: Site) -> bool:
    """Return whether a pattern of `base.overrides` selects a linear.

    A fused linear is selected by each of its roles, because it has one format.
    """
    return pattern in site.roles or fnmatchcase(site.path, pattern)


def base_format_of(recipe: Recipe, file_dtype: torch.dtype) -> BaseFormat:
    """Return the format of the base's linears.

    recipe: resolved, without `auto`. file_dtype: dtype of the checkpoint. Raises ModelError if the
    file of `base.importance` is missing or damaged.
    """
    base, compute = recipe.base, torch_dtype(recipe.base.compute_dtype)
    default = WeightFormat(
        bits=base.default_bits,
        compute=compute,
        storage=storage_dtype(file_dtype, compute),
        quant_type=base.quant_type,
        double_quant=base.double_quant,
        threshold=base.outlier_threshold,
        scales=base.scales,
    )
    importance = read_importance(base.importance) if base.importance is not None else {}
    return BaseFormat(default, tuple(base.overrides.items()), importance)


def storage_dtype(file: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype in which unquantized weights are stored.

    file: dtype of the checkpoint. compute: compute dtype; if it has 16 bits it is used, because a
    matrix product needs both operands in it.
    """
    if compute.itemsize == 2:
        return compute
    return file if file.itemsize == 2 else torch.float16
