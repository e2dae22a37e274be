"""The one training step: a window of batches, forward and backward, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.errors import QloraError
from qlora_cli.memory.tracker import mark, scope
from qlora_cli.train.forward import batch_loss
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
    the same in every batch and in the last, shorter window too. Raises QloraError where the loss
    or the gradients are not finite.
    """
    num_targets = sum(batch.num_targets for batch in window)
    scale = state.loss_scale.value / num_targets
    with scope("loss"):
        total = torch.zeros((), dtype=torch.float32, device=state.device)
    for batch in window:
        mark("forward")
        loss = batch_loss(state.built, batch, state.device, scale)
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
    state.loss_scale.update(finite)
    state.step += 1
    if not finite and state.loss_scale.exhausted:
        raise _not_finite(state, loss_value)
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


def _not_finite(state: State, loss: float) -> QloraError:
    return QloraError(
        f"step {state.step}: the loss is {loss}, or its gradients are not finite",
        hint="the last checkpoint is good; lower train.lr, or use base.compute_dtype=bfloat16 or "
        "float32 if it is float16",
    )
