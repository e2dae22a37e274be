"""An optimizer of which each process of a job has the states of its pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qlora_cli.recipe.schema import Train
from qlora_cli.runs.optimizer_states import part_of_state
from qlora_cli.train.division import Division
from qlora_cli.train.optimizer import TrainingOptimizer, make_optimizer


class DividedOptimizer:
    """Updates the pieces of this process and exchanges them, as a `TrainingOptimizer`.

    own: the optimizer of the pieces.
    """

    def __init__(self, own: TrainingOptimizer, division: Division) -> None:
        self._own = own
        self._division = division
        self.has_states = False
        """Whether any process has states. One whose pieces are all empty has none."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """The states by piece; empty before the first update."""
        return self._own.state

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The groups of pieces, each under the key `params`."""
        return self._own.param_groups

    def apply(self, factor: float, lr: float) -> None:
        """Update every parameter. All processes call this together."""
        self._division.release()
        self._own.apply(factor, lr)
        self.has_states = True
        self.zero_grad()
        self._division.exchange_pieces()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of the pieces and of the parameters."""
        self._own.zero_grad(set_to_none=set_to_none)
        self._division.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this process."""
        return self._own.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all parameters, of which each process keeps its part.

        state_dict: as an optimizer of one process has it. All processes call this together, and
        that of the main one counts. Raises ValueError if it is for other parameters.
        """
        processes = self._division.processes
        ranks = range(processes.size)
        parts = [self._part(state_dict, rank) for rank in ranks] if processes.is_main else None
        self.has_states = processes.broadcast(bool(state_dict.get("state")))
        self._own.load_state_dict(processes.scatter(parts))

    def _part(self, complete: dict[str, Any], rank: int) -> dict[str, Any]:
        """Return the states of the pieces of one process."""
        cuts = dict(zip(map(id, self._division.pieces), self._division.cuts, strict=True))
        pieces = [piece for group in self.param_groups for piece in group["params"]]
        indices = [index for group in complete["param_groups"] for index in group["params"]]
        states = {}
        for index, piece in zip(indices, pieces, strict=True):
            start, end = cuts[id(piece)][rank : rank + 2]
            if start < end and index in complete["state"]:
                states[index] = part_of_state(complete["state"][index], start, end)
        return {**complete, "state": states}


def make_divided_optimizer(
    train: Train,
    division: Division,
    device: torch.device,
    lr_factors: Mapping[nn.Parameter, float],
) -> TrainingOptimizer:
    """Create the optimizer of a recipe for the pieces of this process.

    lr_factors: as of `make_optimizer`, by parameter. Its errors are raised.
    """
    pieces = dict(zip(division.parameters, division.pieces, strict=True))
    factors = {pieces[parameter]: factor for parameter, factor in lr_factors.items()}
    own = make_optimizer(train, division.pieces, device, factors)
    return own if division.processes.size == 1 else DividedOptimizer(own, division)
