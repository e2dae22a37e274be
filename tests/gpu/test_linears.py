"""Packed and adapted linears on a card: forward and backward are the host's in float32.

Both sides hold the same codes, packed on the host. What may differ is rounding to the dtype that
the card computes in: of the weight, of A and B, of x A^T, of the output or the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.nn.quant import QuantLinear, WeightFormat
from tests.helpers.quantized import draw
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
IN, OUT, TOKENS = 512, 384, 96
PLAIN = {"q": slice(0, OUT)}
FUSED = {"q": slice(0, 128), "v": slice(256, 384)}
"""Of a fused q/k/v: k in the middle is not adapted."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> float:
    """Of the norm of what differs: four roundings, or a sum of `IN` terms in another order."""
    eps = torch.finfo(dtype).eps
    return eps * (IN**0.5 if dtype == torch.float32 else 4)


def frozen(bits: int, compute: torch.dtype, bias: bool = False) -> QuantLinear:
    layer = QuantLinear(IN, OUT, bias, WeightFormat(bits, compute, torch.float16))
    layer.pack(draw(OUT, IN, dtype=torch.float16) * IN**-0.5)
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(draw(OUT, seed=5).to(compute), requires_grad=False)
    return layer


def adapted(
    bits: int, compute: torch.dtype, parts: Mapping[str, slice], dtype: torch.dtype
) -> LoraLinear:
    layer = LoraLinear(frozen(bits, compute), parts, LoraSettings(16, 32.0, 0.0, dtype, False))
    generator = torch.Generator().manual_seed(1)
    layer.initialize(CPU, generator)
    for b in layer.lora_b.values():
        b.data.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return layer


def answers(layer: QuantLinear | LoraLinear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients, fetched as float32."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    found = {"y": y.detach(), "x": x.grad, **trained}
    return {name: t.to(CPU).float() for name, t in found.items() if t is not None}


def compare(
    reference: QuantLinear | LoraLinear,
    layer: QuantLinear | LoraLinear,
    card: torch.device,
    dtype: torch.dtype,
    allowed: float,
) -> None:
    """Inputs are rounded beforehand, so that both sides begin with the same."""
    x, grad = draw(TOKENS, IN, seed=2).to(dtype), draw(TOKENS, OUT, seed=3).to(dtype)
    wanted = answers(reference, x.float(), grad.float())
    found = answers(layer.to(card), x.to(card), grad.to(card))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        error = ((found[name] - value).norm() / value.norm()).item()
        print(f"{name}: {error:.2e}, allowed {allowed:.2e}")
        assert error < allowed, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_packed_linear(card: torch.device, bits: int, bias: bool, dtype: torch.dtype) -> None:
    reference = frozen(bits, torch.float32, bias)
    compare(reference, frozen(bits, dtype, bias), card, dtype, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_an_8_bit_linear(card: torch.device, outliers: bool, dtype: torch.dtype) -> None:
    """Inputs are rounded to 8 bit on both sides; one on an edge may go to either code."""
    reference, layer = frozen(8, torch.float32), frozen(8, dtype).to(card)
    x = draw(TOKENS, IN, seed=2).to(dtype)
    if outliers:
        x[:, [7, 300]] *= 20
    wanted = reference.product(x.float())
    found = layer.product(x.to(card)).to(CPU).float()
    assert (found - wanted).norm() / wanted.norm() < tolerance(dtype) + 2e-3
    grad = draw(TOKENS, OUT, seed=3).to(dtype)
    own = layer.grad_input(grad.to(card)).to(CPU).float()
    other = reference.grad_input(grad.float())
    assert (own - other).norm() / other.norm() < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("bits", [4, 16])
def test_an_adapted_linear(
    card: torch.device, bits: int, parts: Mapping[str, slice], dtype: torch.dtype
) -> None:
    reference = adapted(bits, torch.float32, parts, torch.float32)
    layer = adapted(bits, dtype, parts, torch.float32)
    compare(reference, layer, card, dtype, tolerance(dtype))


def test_the_comparison_would_see_a_wrong_scale(card: torch.device) -> None:
    """Five percent of one constant, in the dtype that rounds most."""
    reference = frozen(4, torch.float32)
    layer = frozen(4, torch.bfloat16)
    assert layer.offset_of_scale is not None
    layer.offset_of_scale.data *= 1.05
    with pytest.raises(AssertionError):
        compare(reference, layer, card, torch.bfloat16, tolerance(torch.bfloat16))


def test_a_seed_gives_the_same_adapter_on_a_card(card: torch.device) -> None:
    own, other = (adapted(4, torch.float32, PLAIN, torch.float32) for _ in range(2))
    other.initialize(card, torch.Generator().manual_seed(1))
    own.initialize(CPU, torch.Generator().manual_seed(1))
    assert torch.equal(own.lora_a["q"], other.lora_a["q"].to(CPU))
