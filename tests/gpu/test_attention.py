"""Attention over packed rows equals attention over each row, with and without FlashAttention.

The reference is computed by definition in float32 on the CPU, on inputs that are already rounded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qlora_cli.memory.device import profile_of
from qlora_cli.nn.attention import FLASH_CAPABILITY, attend, kernel_for
from qlora_cli.nn.spans import Spans, use_spans
from tests.helpers.quantized import draw
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
LENGTHS = (150, 1, 37, 260)
"""Row lengths: more than a kernel's tile of 128, a single token, less than a tile."""
WINDOW = 64
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclass
class Inputs:
    """query (1, H, T, D); key, value (1, G, T, D); grad (1, T, H, D) of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, heads: int, groups: int, size: int, dtype: torch.dtype) -> Inputs:
        tokens = sum(LENGTHS)
        shapes = ((heads, tokens), (groups, tokens), (groups, tokens), (tokens, heads))
        return cls(*(draw(1, *s, size, seed=i, dtype=dtype) for i, s in enumerate(shapes)))


def on_gpu(
    inputs: Inputs,
    gpu: torch.device,
    window: int | None,
    lengths: tuple[int, ...] = LENGTHS,
    causal: bool = True,
) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, computed on the GPU."""
    spans = Spans.on(lengths, gpu, kernel_for(profile_of(gpu), inputs.query.dtype))
    given = [t.to(gpu).detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
    with use_spans(spans):
        out, _ = attend(torch.nn.Module(), *given, None, sliding_window=window, is_causal=causal)
    out.backward(inputs.grad.to(gpu))
    return [out.detach(), *(t.grad for t in given if t.grad is not None)]


def expected(inputs: Inputs, window: int | None, causal: bool = True) -> list[Tensor]:
    """Return the same by definition, row by row, on the CPU."""
    query, key, value = (
        t.float().detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)
    )
    groups = query.shape[1] // key.shape[1]
    rows = []
    for start, length in zip(itertools.accumulate((0, *LENGTHS)), LENGTHS, strict=False):
        at = slice(start, start + length)
        keys, values = (t[:, :, at].repeat_interleave(groups, dim=1) for t in (key, value))
        scores = query[:, :, at] @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        seen = torch.ones(length, length, dtype=torch.bool)
        if window is not None:
            seen &= torch.ones_like(seen).triu(diagonal=1 - window)
            seen &= torch.ones_like(seen).tril(diagonal=window - 1)
        if causal:
            seen = seen.tril()
        rows.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ values)
    out = torch.cat(rows, dim=2).transpose(1, 2)
    out.backward(inputs.grad.float())
    return [out.detach(), *(t.grad for t in (query, key, value) if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["own heads", "grouped", "one group"])
def test_rows_attend_only_to_themselves(
    gpu: torch.device, groups: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    inputs = Inputs.draw(4, groups, size, dtype)
    eps = torch.finfo(dtype).eps
    # Scores, probabilities, their gradients and the output are each rounded once.
    allowed = 4 * eps if dtype != torch.float32 else size * eps
    found, reference = on_gpu(inputs, gpu, window), expected(inputs, window)
    for name, own, other in zip(("out", "dq", "dk", "dv"), found, reference, strict=True):
        error = ((own.to(CPU).float() - other).norm() / other.norm()).item()
        print(f"{name}: {error:.2e}, allowed {allowed:.2e}")
        assert error < allowed, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, WINDOW], ids=["all keys", "window"])
def test_rows_of_an_encoder_attend_to_both_sides(
    gpu: torch.device, window: int | None, dtype: torch.dtype
) -> None:
    inputs = Inputs.draw(4, 4, 64, dtype)
    eps = torch.finfo(dtype).eps
    allowed = 4 * eps if dtype != torch.float32 else 64 * eps
    found = on_gpu(inputs, gpu, window, causal=False)
    for own, other in zip(found, expected(inputs, window, causal=False), strict=True):
        assert ((own.to(CPU).float() - other).norm() / other.norm()).item() < allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_depends_on_its_neighbours(gpu: torch.device, dtype: torch.dtype) -> None:
    """A row is equal bit for bit with other neighbours, whose gradients are exactly zero."""
    inputs, changed = (Inputs.draw(4, 2, 64, dtype) for _ in range(2))
    mine = slice(151, 188)
    away = torch.ones(sum(LENGTHS), dtype=torch.bool)
    away[mine] = False
    for tensor in (changed.query, changed.key, changed.value):
        tensor[:, :, away] += 3
    inputs.grad[:, away] = 0
    found = on_gpu(inputs, gpu, None)
    assert torch.equal(found[0][:, mine], on_gpu(changed, gpu, None)[0][:, mine])
    for gradient in found[1:]:
        assert not gradient[:, :, away.to(gpu)].any()
        assert gradient[:, :, mine].any()


def test_a_leak_between_rows_would_be_detected(gpu: torch.device) -> None:
    """With all rows treated as one, the result must differ."""
    inputs = Inputs.draw(4, 2, 64, torch.bfloat16)
    leaking = on_gpu(inputs, gpu, None, (sum(LENGTHS),))[0].to(CPU).float()
    reference = expected(inputs, None)[0]
    assert (leaking - reference).norm() / reference.norm() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_one_that_the_plan_uses(
    counting_gpu: torch.device, dtype: torch.dtype
) -> None:
    """FlashAttention is in the graph if GPU and dtype support it; the MATH kernel never is."""
    flash = torch.cuda.get_device_capability(counting_gpu) >= FLASH_CAPABILITY
    inputs = Inputs.draw(4, 2, 64, dtype)
    spans = Spans.on(LENGTHS, counting_gpu, kernel_for(profile_of(counting_gpu), dtype))
    given = [
        t.to(counting_gpu).detach().requires_grad_()
        for t in (inputs.query, inputs.key, inputs.value)
    ]
    with use_spans(spans):
        names = operation_names(attend(torch.nn.Module(), *given, None)[0])
    assert not any("Softmax" in name for name in names), names
    varlen = flash and dtype != torch.float32
    assert (spans.kernel == "varlen") is varlen
    assert ("FlashAttentionBackward0" in names) is varlen, names


def operation_names(tensor: Tensor) -> set[str]:
    """Return the names of all operations in the backward graph of a tensor."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [previous for previous, _ in node.next_functions]
    return names
