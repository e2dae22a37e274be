"""AdamW with float32 states and float32 master weights.

torch.optim.AdamW is not used, because it has no float32 master copy for 16-bit parameters, which
full fine-tuning and float16 adapters need (an update with learning rate 2e-4 is lost in a float16
weight), and because its fused implementation refuses tensors on `meta`. The arithmetic is torch's
own fused kernel. Source: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import scope
from qlora_cli.train.optimizer_state import load_states

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Each value of a parameter needs 8 bytes of state, and 4 more for its master copy if the
    parameter is 16 bit.

    `lr_factor` of a parameter group multiplies its learning rate; checkpoints of older versions
    have none. `grad_factor` of a group multiplies its gradients. 16-bit gradients are multiplied in
    float32, so that unscaling them does not underflow.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], weight_decay: float
    ) -> None:
        """parameters: parameters, or groups of them."""
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay, "grad_factor": 1.0})

    def apply(self, factor: float, lr: float) -> None:
        """Update every parameter with its gradient times `factor` at learning rate `lr`."""
        for group in self.param_groups:
            group["lr"], group["grad_factor"] = lr * group.get("lr_factor", 1.0), factor
        # Temporary tensors of the update; `_create_state` puts the states under "optimizer".
        with scope("temporary"):
            self.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore states, keeping them in float32. Raises ValueError for other parameters."""
        load_states(self, super().load_state_dict, state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, with the settings of its group."""
        assert closure is None
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for parameter in with_grad:
                if not self.state[parameter]:
                    self._create_state(parameter)
            self._update_float32([p for p in with_grad if p.dtype == torch.float32], group)
            # One at a time: only one float32 copy of a gradient exists at any moment.
            for parameter in (p for p in with_grad if p.dtype != torch.float32):
                self._update_16_bit(parameter, group)

    def _create_state(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        with scope("optimizer"):
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
            state["step"] = parameter.new_zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)

    def _update_float32(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update float32 parameters of one group together."""
        if not parameters:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        if group["grad_factor"] != 1.0:
            torch._foreach_mul_(grads, group["grad_factor"])
        _fused_update(parameters, grads, [self.state[p] for p in parameters], group)

    def _update_16_bit(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Update the float32 master copy and round it into the parameter."""
        assert parameter.grad is not None
        state = self.state[parameter]
        with scope("temporary"):
            grad = parameter.grad.float().mul_(group["grad_factor"])
        _fused_update([state["master"]], [grad], [state], group)
        parameter.copy_(state["master"])


def _fused_update(
    weights: list[Any], grads: list[Any], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> None:
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1.0)
    torch._fused_adamw_(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=group["weight_decay"],
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )
