"""The training step: forward and backward of each micro-batch, gradient clipping, update.

The dry run calls the same function, and the package has no other `.backward()` call.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.errors import DoesNotFit, MicroBatchTooLarge, NotFinite
from qlora_cli.files.finite import DIVERGENCE_HINT
from qlora_cli.files.safetensors_io import is_finite
from qlora_cli.memory.scopes import mark, scope
from qlora_cli.models.placement.block_shards import BlockShards
from qlora_cli.shortage import converted
from qlora_cli.tasks.task import MetricSums
from qlora_cli.train.backward_update import BackwardUpdates
from qlora_cli.train.nonfinite import describe_nonfinite
from qlora_cli.train.reduce import reduce_step, report_shortage
from qlora_cli.train.state import State


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step reports.

    loss: mean over the targets of all micro-batches, without the loss scale. grad_norm: before
    clipping. tokens: of all micro-batches, with or without a target. skipped: float16 gradients
    overflowed, so no parameter was updated and the loss scale was halved. metrics: the task's other
    metrics, each the mean over the targets.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


def train_step(state: State, batches: Sequence[Batch], lr: float) -> StepOutcome:
    """Do one optimizer step with learning rate `lr` and count it in `state.step`.

    batches: the micro-batches of the step, of which each process computes its share. The loss of
    each is divided by the number of targets in all of them, so that accumulated micro-batches give
    the gradient of one large batch, on any number of processes. Raises NotFinite if the loss is not
    finite, or if gradients are not finite and the loss scale cannot be the cause;
    MicroBatchTooLarge if a pass runs out of memory, and then nothing has changed.
    """
    metrics = MetricSums()
    updates = _updates_in_backward(state, lr)
    try:
        with updates or nullcontext():
            total = _accumulate_gradients(state, batches, metrics)
    except (RuntimeError, MemoryError) as error:
        state.optimizer.zero_grad(set_to_none=True)
        shortage = converted(error)
        if not isinstance(shortage, DoesNotFit):
            raise
        if isinstance(state.loaded.stream, BlockShards) or (updates and updates.has_begun):
            # The others wait for an exchange of weights, or some parameters are those of the next
            # step already, so this step cannot be tried again.
            raise shortage from error
        report_shortage(state.processes, shortage.what)
        raise MicroBatchTooLarge(shortage.what, hint=shortage.hint) from error
    mark("update")
    _reduce(state, total, metrics)
    with scope("temporary"):
        norm = updates.norm().to(state.device) if updates else _gradient_norm(state)
        loss_value, norm_value, *sums = _read([total, norm, *metrics.sums.values()])
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite and not updates:
            _update(state, norm_value, lr)
    state.optimizer.zero_grad(set_to_none=True)
    loss_value, norm_value = (v / state.loss_scale.value for v in (loss_value, norm_value))
    state.step += 1
    if not finite:
        _check_overflow(state, loss_value, batches)
    state.loss_scale.update(finite)
    if not finite and state.loss_scale.exhausted:
        raise _diverged(state, f"the loss is {loss_value}, but its gradients are not finite")
    tokens, targets = sum(batch.num_tokens for batch in batches), state.task.num_targets(batches)
    means = {name: value / targets for name, value in zip(metrics.sums, sums, strict=True)}
    return StepOutcome(loss_value, norm_value, tokens, not finite, means)


def _updates_in_backward(state: State, lr: float) -> BackwardUpdates | None:
    """Return what updates parameters in the backward pass; None if the recipe does it after."""
    if not state.recipe.train.update_in_backward:
        return None
    blocks = state.loaded.family.blocks
    return BackwardUpdates(state.trainable, blocks, state.optimizer, lr)


def _accumulate_gradients(state: State, batches: Sequence[Batch], metrics: MetricSums) -> Tensor:
    """Run forward and backward of this process' micro-batches. Return their loss.

    It is multiplied by the loss scale and divided by the targets of the step. metrics: receives the
    sums of the task's other metrics.
    """
    scale = state.loss_scale.value / state.task.num_targets(batches)
    with scope("loss"):
        total = torch.zeros((), dtype=torch.float32, device=state.device)
    own = [(index, scale, metrics) for index in state.processes.share(len(batches))]
    own += [(0, 0.0, MetricSums())] * _num_idle_passes(state, len(batches))
    for index, own_scale, sums in own:
        mark("forward")
        _seed_dropout(state, index)
        loss = state.task.loss(state.loaded, batches[index], state.device, own_scale, sums)
        mark("backward")
        if _may_update(state, loss):
            loss.backward()
        state.division.end_backward()
        total += loss.detach()
        # Free the loss before the next forward pass, not when the name is assigned again.
        del loss
    return total


def _may_update(state: State, loss: Tensor) -> bool:
    """Return False if a backward pass would update parameters with a loss that is not finite.

    The loss is read from the device only if the backward pass updates parameters.
    """
    return loss.is_meta or not state.recipe.train.update_in_backward or math.isfinite(loss.item())


def _num_idle_passes(state: State, number: int) -> int:
    """Return how many passes this process runs that count for nothing, on another's micro-batch.

    Processes that share the base exchange weights in every pass, so all run equally many. number:
    of micro-batches of the step.
    """
    if not isinstance(state.loaded.stream, BlockShards):
        return 0
    processes = state.processes
    return max(0, -(-number // processes.size) - len(processes.share(number)))


def _seed_dropout(state: State, index: int) -> None:
    """Seed the generator of the dropout masks for one micro-batch.

    The masks depend on the number of the micro-batch in the step, and not on the process that
    computes it. index: this number.
    """
    if state.recipe.adapter.dropout:
        numbers = random.Random(f"{state.recipe.train.seed}/{state.step}/{index}")
        torch.default_generator.manual_seed(numbers.getrandbits(63))


def _reduce(state: State, total: Tensor, metrics: MetricSums) -> None:
    """Add up loss, metrics and gradients of all processes. Raises MicroBatchTooLarge."""
    try:
        reduce_step(state.division, total, metrics)
    except MicroBatchTooLarge:
        state.optimizer.zero_grad(set_to_none=True)
        raise


def _gradient_norm(state: State) -> Tensor:
    """Return the norm of all gradients, of which each process has those of its pieces."""
    grads = [p.grad for p in state.division.pieces if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if state.processes.size == 1:
        return norm
    # In float64, which holds the square of every float32 norm.
    square = norm.to(state.device, torch.float64).square()
    state.processes.add(square)
    return square.sqrt()


def _update(state: State, norm: float, lr: float) -> None:
    """Update the parameters. The optimizer unscales and clips gradients in one multiplication.

    norm: of the gradients as they are, with the loss scale in them.
    """
    limit = state.recipe.train.max_grad_norm
    true_norm = norm / state.loss_scale.value
    factor = 1.0 / state.loss_scale.value
    if limit is not None and true_norm > limit:
        factor *= limit / (true_norm + 1e-6)
    state.optimizer.apply(factor, lr)


def _read(scalars: Sequence[Tensor]) -> list[float]:
    """Copy the loss, the norm and the metrics to the CPU. Return ones on meta.

    These are the only values that a step reads back from the device, in one copy.
    """
    values = torch.stack([scalar.float() for scalar in scalars])
    if values.is_meta:
        return [1.0] * len(scalars)
    read: list[float] = values.tolist()
    return read


def _check_overflow(state: State, loss: float, batches: Sequence[Batch]) -> None:
    """Check that the loss scale alone can explain gradients that are not finite.

    loss: without the loss scale. batches: the micro-batches of the step. Raises NotFinite if the
    loss or a parameter is not finite. Parameters are checked on the CPU, because the planned memory
    of a step does not include a check on the device.
    """
    if not math.isfinite(loss):
        where = describe_nonfinite(state, batches)
        place = f"; {where}" if where else ""
        raise _diverged(state, f"the loss is {loss}, which is not finite{place}")
    pieces = zip(state.trainable, state.division.pieces, strict=True)
    own = [name for name, piece in pieces if not is_finite(piece.detach().cpu())]
    for name in itertools.chain.from_iterable(state.processes.gather(own)):
        raise _diverged(state, f"{name} is not finite")


def _diverged(state: State, reason: str) -> NotFinite:
    return NotFinite(f"step {state.step}: {reason}", hint=DIVERGENCE_HINT)
