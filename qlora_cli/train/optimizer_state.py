"""Restores an optimizer's states from a checkpoint without changing their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_cli.runs.optimizer_states import VALUES


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
    load(state_dict)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                shape = parameter.shape if key in VALUES else value.shape
                optimizer.state[parameter][key] = value.to(parameter.device).view(shape)
