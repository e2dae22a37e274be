"""Restores an optimizer's states from a checkpoint without changing their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_cli.runs.optimizer_states import VALUES, mapped_state


def load_states(
    optimizer: torch.optim.Optimizer,
    load: Callable[[dict[str, Any]], object],
    state_dict: dict[str, Any],
) -> None:
    """Restore `optimizer` with `load` and then put back each state tensor exactly as it was saved.

    load: the `load_state_dict` of the optimizer's class, which casts states to the dtype of their
    parameter; states of 16-bit parameters must stay float32. state_dict: from `state_dict()`, with
    tensors on any device. Raises ValueError if it is for other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=True))

    def shaped(index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return states in the shape of their parameter: files of several processes have none."""
        shape = by_index[index].shape
        return mapped_state(lambda key, v: v.view(shape) if key in VALUES else v, state)

    states = {i: shaped(i, s) if i in by_index else s for i, s in state_dict["state"].items()}
    load({**state_dict, "state": states})
    for index, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                parameter = by_index[index]
                optimizer.state[parameter][key] = value.to(parameter.device)
