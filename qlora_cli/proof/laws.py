"""The laws that a model type must obey, each checked on a small model of the same type.

Every law returns a number that measures how far it is violated: the largest difference, relative to
the largest expected value. Sources of the expected values are transformers' own model and the plain
formula W + sBA, never this package's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.adapters.adapted_modules import adapted_layers, adapted_stacks
from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.data.collate import Batch
from qlora_cli.models.classifier import classifier_logits, head_inputs, pooled_states
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.trained_head import head_parameters
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.loss import head_output
from qlora_cli.proof.composition import (
    composed_stacks,
    composed_weights,
    quantized_stacks,
    quantized_weights,
    stack_as_matrices,
)
from qlora_cli.proof.small_model import CPU, SmallModel
from qlora_cli.tasks.backbone import hidden_states

EXACT = 1e-5
"""Largest relative difference between two float32 computations of the same values."""
_ROWS = (13, 9)
"""Lengths of the rows; longer than the small config's sliding window."""


def logits(small: SmallModel) -> float:
    """Compare the logits of a row with those of transformers, at 16 bit and without an adapter."""
    with small.without_adapter() as loaded:
        return max(_compare_rows(small, loaded, length) for length in _ROWS)


def packing(small: SmallModel) -> float:
    """Compare the logits of packed rows with those of transformers for each row alone."""
    rows = small.rows(*_ROWS)
    with torch.no_grad(), small.without_adapter() as loaded:
        packed = logits_of(loaded, small.batch(*_ROWS))
        # A classifier has one vector of logits per row.
        sizes = [1] * len(rows) if loaded.family.is_classifier else list(_ROWS)
        alone = [small.reference(input_ids=torch.tensor([row.ids])).logits[0] for row in rows]
    return max(map(difference, packed.split(sizes), alone))


def leak(small: SmallModel) -> float:
    """Return how much packed rows change if the limits between them are removed.

    It must be large: else the law of packing could not detect rows that attend to each other.
    """
    batch = small.batch(*_ROWS)
    merged = Batch(
        batch.input_ids, batch.position_ids, batch.labels, (sum(_ROWS),), batch.num_targets
    )
    with torch.no_grad(), small.without_adapter() as loaded:
        found, expected = logits_of(loaded, merged), logits_of(loaded, batch)
        if loaded.family.is_classifier:
            # The row whose pooled token is at the end of the merged sequence at which it pools.
            expected = expected[-1 if loaded.family.classifier.pooling == "last" else 0]
        return difference(found, expected)


def gradients(small: SmallModel) -> float:
    """Compare the gradients of A and B with those through the composed weights W + sBA.

    The gradients of a classification head are compared, too. In a long recurrence the rounding
    errors of transformers' own float32 values can exceed the limit: then float64 values decide.
    """
    found = _gradients(small, small.loaded, small.batch(_ROWS[0]))
    value = _gradient_difference(small, found)
    if value <= EXACT:
        return value
    try:
        with _in_float64(small):
            return _gradient_difference(small, found)
    except RuntimeError:  # Some classes compute parts in float32 only.
        return value


@contextmanager
def _in_float64(small: SmallModel) -> Iterator[None]:
    """Let transformers' model compute in float64 inside the block. No value changes."""
    small.reference.double()
    try:
        yield
    finally:
        small.reference.float()


def _gradient_difference(small: SmallModel, found: Mapping[int, Tensor]) -> float:
    """Return the largest difference of gradients. found: id of each parameter -> its gradient."""
    loaded, batch = small.loaded, small.batch(_ROWS[0])
    expected: list[tuple[nn.Parameter, Tensor]] = []
    with composed_weights(small, loaded) as weights, composed_stacks(small, loaded) as stacks:
        output = small.reference(input_ids=batch.input_ids).logits[0]
        heads = head_parameters(loaded)
        composed = {**weights, **stacks}
        composed |= {name: small.reference.get_parameter(name) for name in heads}
        loss = _reference_loss(output, batch)
        grads = torch.autograd.grad(loss / batch.num_targets, list(composed.values()))
        by_path = dict(zip(composed, grads, strict=True))
    for path, layer in adapted_layers(loaded.model):
        expected += _expected_gradients(layer, by_path[path])
    for path, stack in adapted_stacks(loaded.model):
        expected += _expected_stack_gradients(stack, stack_as_matrices(small, path, by_path[path]))
    expected += [(parameter, by_path[name]) for name, parameter in heads.items()]
    scale = max(value.abs().max().item() for _, value in expected)
    return max(
        (value - found[id(parameter)]).abs().max().item() / scale for parameter, value in expected
    )


def checkpointing(small: SmallModel) -> float:
    """Compare the gradients with and without activation checkpointing, which must be equal bits."""
    batch = small.batch(*_ROWS)
    found: list[list[Tensor]] = []
    for loaded in (small.loaded, small.build(activation_checkpointing=True)):
        loaded.model.train()
        found.append(list(_gradients(small, loaded, batch).values()))
        loaded.model.eval()
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    return 0.0 if same and all(same) else 1.0


def quantized(small: SmallModel) -> float:
    """Compare the logits of the 4-bit model with transformers' on the dequantized weights."""
    loaded = small.build(bits=4, with_adapter=False)
    layers = {path: layer.base for path, layer in adapted_layers(loaded.model)}
    with quantized_weights(small, layers), quantized_stacks(small, loaded):
        return _compare_rows(small, loaded, _ROWS[0])


def _reference_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the summed cross entropy. logits: (T, V) of tokens, or (labels,) of a row."""
    if batch.values is not None:
        return functional.cross_entropy(logits[None], batch.values.long())
    return functional.cross_entropy(
        logits, batch.labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def _compare_rows(small: SmallModel, loaded: LoadedModel, length: int) -> float:
    batch = small.batch(length)
    with torch.no_grad():
        expected = small.reference(input_ids=batch.input_ids).logits[0]
        return difference(logits_of(loaded, batch), expected)


def logits_of(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Return the logits as the loss computes them: (tokens, V), or (rows, labels)."""
    if loaded.family.is_classifier:
        pooled = pooled_states(loaded.family, hidden_states(loaded, batch, CPU), batch.segments)
        return classifier_logits(loaded, head_inputs(loaded, pooled))
    head: Any = loaded.head
    bias = None if head.bias is None else head.bias.float()
    output = head_output(hidden_states(loaded, batch, CPU), head.weight.float(), bias)
    return loaded.family.logits.apply_(output)


def _gradients(small: SmallModel, loaded: LoadedModel, batch: Batch) -> dict[int, Tensor]:
    """Return the id of each trained parameter -> the gradient of the mean loss of `batch`."""
    parameters = list(loaded.trainable().values())
    loss = small.task.loss(loaded, batch, CPU, 1.0 / batch.num_targets)
    gradients = torch.autograd.grad(loss, parameters)
    return {id(parameter): grad for parameter, grad in zip(parameters, gradients, strict=True)}


def difference(value: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value; inf if not finite."""
    found = ((value - expected).abs().max() / expected.abs().max()).item()
    return found if found == found else float("inf")


def _expected_gradients(layer: LoraLinear, grad: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield (A or B, its gradient) by the chain rule. grad: gradient (out, in) of W + sBA."""
    scaling = layer.settings.scaling
    for role, rows in layer.lora_slices.items():
        a, b = layer.lora_a[role], layer.lora_b[role]
        assert isinstance(a, nn.Parameter)
        assert isinstance(b, nn.Parameter)
        yield a, scaling * b.detach().to(grad.dtype).t() @ grad[rows]
        yield b, scaling * grad[rows] @ a.detach().to(grad.dtype).t()


def _expected_stack_gradients(
    stack: LoraStack, grad: Tensor
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield (A or B, its gradient) of experts. grad: gradient (E, out, in) of W + sBA."""
    lora = stack.lora()
    assert isinstance(lora.a, nn.Parameter)
    assert isinstance(lora.b, nn.Parameter)
    yield lora.a, lora.scaling * lora.b.detach().to(grad.dtype).mT @ grad
    yield lora.b, lora.scaling * grad @ lora.a.detach().to(grad.dtype).mT
