"""AdamW, its learning rate and fp16's loss scale: the only place that makes an optimizer.

Why not torch.optim.AdamW: it has no float32 master copy for 16-bit parameters, which full
fine-tuning and float16 adapters need (an update of lr 2e-4 is lost in a float16 weight), and its
fused kernel refuses imagined tensors. The arithmetic is torch's own fused kernel. Source:
Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.memory.tracker import host_memory, scope
from qlora_cli.recipe.schema import Train

BETAS = (0.9, 0.999)
EPSILON = 1e-8
PAGED_FROM = 100_000
"""Elements from which bitsandbytes puts a paged optimizer's state into memory that card and host
share."""


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    A parameter costs 8 bytes of state in float32, and 4 more for its master copy where it is 16 bit
    itself.

    `grad_factor` of a group multiplies its gradients: float16 ones in float32, where what a loss
    scale has saved is not lost again.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay, "grad_factor": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            for parameter in ready:
                if not self.state[parameter]:
                    self._begin(parameter)
            whole = [p for p in ready if p.dtype == torch.float32]
            if whole and group["grad_factor"] != 1.0:
                torch._foreach_mul_([p.grad for p in whole], group["grad_factor"])
            self._update(whole, [p.grad for p in whole], [self.state[p] for p in whole], group)
            # One at a time: only one float32 copy of a gradient exists at any moment.
            for parameter in (p for p in ready if p.dtype != torch.float32):
                state = self.state[parameter]
                with scope("temporary"):
                    grad = parameter.grad.float().mul_(group["grad_factor"])
                self._update([state["master"]], [grad], [state], group)
                parameter.copy_(state["master"])
                # Before the next one is made, not when the name is bound anew.
                del grad

    def _begin(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        with scope("optimizer"):
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
            state["step"] = parameter.new_zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)

    @staticmethod
    def _update(
        weights: list[Any], grads: list[Any], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        if not weights:
            return
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


def make_optimizer(
    train: Train, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The recipe's optimizer. Raises RecipeError for what the device or the parameters rule out."""
    parameters = list(parameters)
    if train.optimizer == "adamw":
        return AdamW(parameters, train.weight_decay)
    paged = train.optimizer.startswith("paged")
    if paged and device.type == "cpu":
        raise RecipeError(
            "this device cannot do what the recipe asks",
            [
                Problem(
                    "train.optimizer",
                    f"{train.optimizer} moves its states between a card and the host, and there is "
                    "no card",
                    "use adamw or adamw8bit",
                )
            ],
        )
    if any(parameter.dtype.itemsize == 2 for parameter in parameters):
        raise RecipeError(
            "the recipe would lose its updates",
            [
                Problem(
                    "train.optimizer",
                    f"{train.optimizer} keeps no float32 copy of a 16-bit weight, and small "
                    "updates vanish in it",
                    "use adamw, or adapter.dtype=float32",
                )
            ],
        )
    from bitsandbytes import optim

    # On imagined tensors there is nothing to page; the unpaged twin has the same states.
    name = {
        "adamw8bit": "AdamW8bit",
        "paged_adamw": "AdamW" if device.type == "meta" else "PagedAdamW",
        "paged_adamw8bit": "AdamW8bit" if device.type == "meta" else "PagedAdamW8bit",
    }[train.optimizer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made: torch.optim.Optimizer = getattr(optim, name)(
            parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=train.weight_decay
        )
    if paged and device.type == "meta":
        made.get_state_buffer = _imagined_pages  # type: ignore[attr-defined]
    return made


def _imagined_pages(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A state as a paged optimizer makes it: a large one is the driver's, not the allocator's."""
    with nullcontext() if parameter.numel() < PAGED_FROM else host_memory():
        return torch.zeros_like(parameter, dtype=dtype)


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Of optimizer step `step` (from 0) of `steps`: linear warm-up, then the recipe's schedule."""
    warmup = math.ceil(train.warmup * steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - warmup) / max(1, steps - warmup)
    if train.schedule == "linear":
        return train.lr * (1 - done)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


class LossScale:
    """Multiplies the loss so that float16 gradients do not vanish; 1 and idle where not needed.

    Halved when gradients overflow (that step is left out), doubled after `PATIENCE` good steps:
    Micikevicius et al. 2018, section 3.2.
    """

    FIRST = 2.0**16
    LEAST = 2.0**-14
    PATIENCE = 2000

    def __init__(self, needed: bool) -> None:
        self.needed = needed
        self.value = self.FIRST if needed else 1.0
        self._good_steps = 0

    def update(self, finite: bool) -> None:
        """After each step, with whether its gradients were finite."""
        if not self.needed:
            return
        if not finite:
            self.value, self._good_steps = self.value / 2, 0
            return
        self._good_steps += 1
        if self._good_steps == self.PATIENCE:
            self.value, self._good_steps = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether halving has stopped helping: the gradients are not finite at any scale."""
        return not self.needed or self.value < self.LEAST

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": float(self._good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.value, self._good_steps = state["value"], int(state["good_steps"])
