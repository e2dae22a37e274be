"""The AdamW variants of bitsandbytes: 8-bit states and paged states."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_cli.memory.scopes import host_memory, scope
from qlora_cli.train.adamw import BETAS, EPSILON
from qlora_cli.train.optimizer_state import load_states

EIGHT_BIT_FROM = 4096
"""Number of values from which bitsandbytes keeps 8-bit states of a parameter. It is a multiple of
the number of values that share a scale (`SCALE_BLOCK`)."""
PAGED_FROM = 100_000
"""Number of values from which bitsandbytes allocates a paged optimizer's state as CUDA managed
memory, which the driver moves between GPU and CPU."""


class BitsAndBytesAdamW:
    """AdamW of bitsandbytes, with the interface of `TrainingOptimizer`."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        weight_decay: float,
        *,
        variant: Literal["AdamW", "AdamW8bit"],
        paged: bool = False,
    ) -> None:
        """groups: of parameters. variant: class of `bitsandbytes.optim`.

        paged: use its paged version, on a GPU only.
        """
        from bitsandbytes import optim

        groups = list(groups)
        is_planned = any(p.is_meta for group in groups for p in group["params"])
        # Tensors on meta cannot be paged; the version without paging has the same states.
        name = f"Paged{variant}" if paged and not is_planned else variant
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._optimizer: torch.optim.Optimizer = getattr(optim, name)(
                groups, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay
            )
        if paged and is_planned:
            self._optimizer.get_state_buffer = _planned_state

    @property
    def state(self) -> Mapping[Any, Any]:
        """The states by parameter; empty before the first update."""
        return self._optimizer.state

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The groups of parameters, each under the key `params`."""
        return self._optimizer.param_groups

    def apply(self, factor: float, lr: float) -> None:
        """Update every parameter with its gradient times `factor` at learning rate `lr`."""
        groups = self._optimizer.param_groups
        parameters = (p for group in groups for p in group["params"])
        grads = [p.grad for p in parameters if p.grad is not None]
        if factor != 1.0 and grads:
            torch._foreach_mul_(grads, factor)
        for group in groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        # bitsandbytes allocates its states within the first step and names no category for them.
        with scope("optimizer"):
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore states in their own dtypes. Raises ValueError for other parameters."""
        load_states(self._optimizer, self._optimizer.load_state_dict, state_dict)


def _planned_state(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a state on meta, counted like a paged one: a large one is not in GPU memory."""
    with nullcontext() if parameter.numel() < PAGED_FROM else host_memory():
        return torch.zeros_like(parameter, dtype=dtype)
