"""The optimizers that a recipe can name. This is the only place that creates one.

A new optimizer is one entry in `OPTIMIZERS` and its name in the recipe's schema
(`recipe.schema.Optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.recipe.schema import Train
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.bitsandbytes_adamw import EIGHT_BIT_FROM, BitsAndBytesAdamW


class TrainingOptimizer(Protocol):
    """An optimizer as the training step and checkpoints use it.

    An implementation allocates its states in the memory category "optimizer".
    """

    @property
    def state(self) -> Mapping[Any, Any]:
        """The states by parameter; empty before the first update."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The groups of parameters, each under the key `params`."""

    def apply(self, factor: float, lr: float) -> None:
        """Update every parameter with its gradient times `factor` at learning rate `lr`.

        The learning rate is multiplied by the group's `lr_factor`. factor: removes the loss scale
        and clips the gradient norm.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states exactly. Raises ValueError if they are for other parameters."""


@dataclass(frozen=True)
class OptimizerEntry:
    """How an optimizer is created, and what it can do.

    create: called with the groups of trained parameters and the weight decay. A group has the keys
    `params` and `lr_factor`, by which its learning rate is multiplied. is_paged: its states are in
    CUDA managed memory, so it needs a GPU. has_master_weights: it keeps a float32 copy of each
    16-bit parameter. unit: number of values; a piece of a parameter that begins and ends at
    multiples of it is updated like the same part of the complete parameter.
    """

    create: Callable[[list[dict[str, Any]], float], TrainingOptimizer]
    is_paged: bool = False
    has_master_weights: bool = False
    unit: int = 16


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(AdamW, has_master_weights=True),
    "adamw8bit": OptimizerEntry(
        partial(BitsAndBytesAdamW, variant="AdamW8bit"), unit=EIGHT_BIT_FROM
    ),
    "paged_adamw": OptimizerEntry(
        partial(BitsAndBytesAdamW, variant="AdamW", paged=True), is_paged=True
    ),
    "paged_adamw8bit": OptimizerEntry(
        partial(BitsAndBytesAdamW, variant="AdamW8bit", paged=True),
        is_paged=True,
        unit=EIGHT_BIT_FROM,
    ),
}
"""`train.optimizer` -> how it is created."""


_NO_FACTORS: Mapping[nn.Parameter, float] = MappingProxyType({})


def make_optimizer(
    train: Train,
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    lr_factors: Mapping[nn.Parameter, float] = _NO_FACTORS,
) -> TrainingOptimizer:
    """Create the optimizer of a recipe for `parameters`, which are on `device`.

    lr_factors: factor of the learning rate of each parameter whose factor is not 1.

    Raises RecipeError if the optimizer needs a GPU and `device` is a CPU, or if a parameter is 16
    bit and the optimizer keeps no float32 copy of it.
    """
    name, entry = train.optimizer, OPTIMIZERS[train.optimizer]
    parameters = list(parameters)
    if entry.is_paged and device.type == "cpu":
        raise RecipeError(
            "this device does not support a setting of the recipe",
            [
                Problem(
                    "train.optimizer",
                    f"{name} moves its states between GPU and CPU memory, and there is no GPU",
                    "use adamw or adamw8bit",
                )
            ],
        )
    if not entry.has_master_weights and any(p.dtype.itemsize == 2 for p in parameters):
        raise RecipeError(
            "this recipe would lose small weight updates",
            [
                Problem(
                    "train.optimizer",
                    f"{name} keeps no float32 copy of a 16-bit weight, and small updates are "
                    "rounded away in 16 bit",
                    "use adamw, or adapter.dtype=float32",
                )
            ],
        )
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(lr_factors.get(parameter, 1.0), []).append(parameter)
    # A job without factors has one group, as its checkpoints of older versions have.
    grouped: list[dict[str, Any]] = [{"params": p, "lr_factor": f} for f, p in groups.items()]
    return entry.create(grouped, train.weight_decay)
