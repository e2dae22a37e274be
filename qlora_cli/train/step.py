"""The one training step: a window of batches, forward and backward, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.errors import NotFinite
from qlora_cli.files.finite import ADVICE
from qlora_cli.files.safetensors_io import is_finite
from qlora_cli.memory.scopes import mark, scope
from qlora_cli.train.optimizer import AdamW
from qlora_cli.train.state import State


@dataclass(frozen=True)
class StepOutcome:
    """loss: mean nats over the window's trained tokens. grad_norm: before clipping. tokens: all.

    skipped: float16 gradients overflowed; nothing was updated and the loss scale was halved.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool


def train_step(state: State, window: Sequence[Batch], lr: float) -> StepOutcome:
    """One optimizer step.

    Each batch's loss is divided by the trained tokens of the whole window, so that a token counts
    the same in every batch and in the last, shorter window too. Raises NotFinite where the loss is
    not finite, and where the gradients are not for another reason than the loss scale.
    """
    num_targets = state.task.num_targets(window)
    scale = state.loss_scale.value / num_targets
    with scope("loss"):
        total = torch.zeros((), dtype=torch.float32, device=state.device)
    for batch in window:
        mark("forward")
        loss = state.task.loss(state.loaded, batch, state.device, scale)
        mark("backward")
        loss.backward()
        total += loss.detach()
        del loss
    mark("update")
    with scope("temporary"):
        norm = _gradient_norm(state)
        loss_value, norm_value = _read(total, norm)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            _update(state, norm_value, lr)
    state.optimizer.zero_grad(set_to_none=True)
    loss_value, norm_value = (v / state.loss_scale.value for v in (loss_value, norm_value))
    state.step += 1
    if not finite:
        _check_overflow(state, loss_value)
    state.loss_scale.update(finite)
    if not finite and state.loss_scale.exhausted:
        raise _diverged(state, f"the loss is {loss_value}, but its gradients are not finite")
    tokens = sum(batch.num_tokens for batch in window)
    return StepOutcome(loss_value, norm_value, tokens, skipped=not finite)


def _gradient_norm(state: State) -> Tensor:
    grads = [p.grad for p in state.trainable.values() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def _update(state: State, norm: float, lr: float) -> None:
    """Unscales and clips in one multiplication, then steps."""
    own = isinstance(state.optimizer, AdamW)
    limit = state.recipe.train.max_grad_norm
    true_norm = norm / state.loss_scale.value
    factor = 1.0 / state.loss_scale.value
    if limit is not None and true_norm > limit:
        factor *= limit / (true_norm + 1e-6)
    if factor != 1.0 and not own:
        grads = [p.grad for p in state.trainable.values() if p.grad is not None]
        torch._foreach_mul_(grads, factor)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
        if own:
            group["grad_factor"] = factor
    # bitsandbytes allocates its states itself; ours names them.
    with scope("temporary" if own else "optimizer"):
        state.optimizer.step()


def _read(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """The only values that a step reads back from the device, in one copy; ones on meta."""
    pair = torch.stack([loss, norm.float()])
    if pair.is_meta:
        return 1.0, 1.0
    loss_value, norm_value = pair.tolist()
    return loss_value, norm_value


def _check_overflow(state: State, loss: float) -> None:
    """Raises NotFinite unless the loss scale alone can explain gradients that are not finite.

    loss: of the forward pass, without the scale. It and every parameter must be finite. Parameters
    are checked on the host: the plan of a step has no memory on the device for that.
    """
    if not math.isfinite(loss):
        raise _diverged(state, f"the loss is {loss}, which is not finite")
    for name, parameter in state.trainable.items():
        if not is_finite(parameter.detach().cpu()):
            raise _diverged(state, f"{name} is not finite")


def _diverged(state: State, what: str) -> NotFinite:
    return NotFinite(f"step {state.step}: {what}", hint=ADVICE)
