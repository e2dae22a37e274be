"""FlashAttention over all rows in one call is each row's own attention; so is the road without it.

The reference is plain arithmetic in float32 on the host, on inputs rounded beforehand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qlora_cli.memory.device import profile_of
from qlora_cli.nn.attention import FLASH_CAPABILITY, Spans, attend, kernel_for
from tests.helpers.quantized import draw
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
LENGTHS = (150, 1, 37, 260)
"""Beyond a kernel's tile of 128, one token alone, within a tile."""
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


def on_card(
    inputs: Inputs, card: torch.device, window: int | None, lengths: tuple[int, ...] = LENGTHS
) -> list[Tensor]:
    """Output and the three gradients."""
    spans = Spans.on(lengths, card, kernel_for(profile_of(card), inputs.query.dtype))
    given = [t.to(card).detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
    out, _ = attend(torch.nn.Module(), *given, None, sliding_window=window, spans=spans)
    out.backward(inputs.grad.to(card))
    return [out.detach(), *(t.grad for t in given if t.grad is not None)]


def wanted(inputs: Inputs, window: int | None) -> list[Tensor]:
    """The same by definition, row by row."""
    query, key, value = (
        t.float().detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)
    )
    groups = query.shape[1] // key.shape[1]
    rows = []
    for start, length in zip(itertools.accumulate((0, *LENGTHS)), LENGTHS, strict=False):
        at = slice(start, start + length)
        keys, values = (t[:, :, at].repeat_interleave(groups, dim=1) for t in (key, value))
        scores = query[:, :, at] @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            seen &= torch.ones_like(seen).triu(diagonal=1 - window)
        rows.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ values)
    out = torch.cat(rows, dim=2).transpose(1, 2)
    out.backward(inputs.grad.float())
    return [out.detach(), *(t.grad for t in (query, key, value) if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["own heads", "grouped", "one group"])
def test_each_row_is_its_own_attention(
    card: torch.device, groups: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    inputs = Inputs.draw(4, groups, size, dtype)
    eps = torch.finfo(dtype).eps
    # Scores, probabilities, their gradients and the output are each rounded once.
    allowed = 4 * eps if dtype != torch.float32 else size * eps
    found, reference = on_card(inputs, card, window), wanted(inputs, window)
    for name, own, other in zip(("out", "dq", "dk", "dv"), found, reference, strict=True):
        error = ((own.to(CPU).float() - other).norm() / other.norm()).item()
        print(f"{name}: {error:.2e}, allowed {allowed:.2e}")
        assert error < allowed, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_sees_its_neighbours(card: torch.device, dtype: torch.dtype) -> None:
    """Other neighbours, the same bits; and a neighbour's own gradient is exactly zero."""
    one, other = (Inputs.draw(4, 2, 64, dtype) for _ in range(2))
    mine = slice(151, 188)
    away = torch.ones(sum(LENGTHS), dtype=torch.bool)
    away[mine] = False
    for tensor in (other.query, other.key, other.value):
        tensor[:, :, away] += 3
    one.grad[:, away] = 0
    found = on_card(one, card, None)
    assert torch.equal(found[0][:, mine], on_card(other, card, None)[0][:, mine])
    for gradient in found[1:]:
        assert not gradient[:, :, away.to(card)].any()
        assert gradient[:, :, mine].any()


def test_a_leak_would_be_seen(card: torch.device) -> None:
    """Told that all rows are one, it must differ."""
    inputs = Inputs.draw(4, 2, 64, torch.bfloat16)
    leaking = on_card(inputs, card, None, (sum(LENGTHS),))[0].to(CPU).float()
    reference = wanted(inputs, None)[0]
    assert (leaking - reference).norm() / reference.norm() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_road_is_the_one_that_the_plan_takes(
    counting_card: torch.device, dtype: torch.dtype
) -> None:
    """FlashAttention by name in the graph where card and dtype have it; nothing of MATH's."""
    flash = torch.cuda.get_device_capability(counting_card) >= FLASH_CAPABILITY
    inputs = Inputs.draw(4, 2, 64, dtype)
    spans = Spans.on(LENGTHS, counting_card, kernel_for(profile_of(counting_card), dtype))
    given = [
        t.to(counting_card).detach().requires_grad_()
        for t in (inputs.query, inputs.key, inputs.value)
    ]
    names = graph(attend(torch.nn.Module(), *given, None, spans=spans)[0])
    assert not any("Softmax" in name for name in names), names
    varlen = flash and dtype != torch.float32
    assert (spans.kernel == "varlen") is varlen
    assert ("FlashAttentionBackward0" in names) is varlen, names


def graph(tensor: Tensor) -> set[str]:
    """Names of all operations that backward would go through."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [before for before, _ in node.next_functions]
    return names
