"""Quantized and adapted linears on the GPU: forward and backward match the CPU in float32.

Both have the same codes, quantized on the CPU. They may differ by rounding to the GPU's compute
dtype: of the weight, of A and B, of x A^T, and of the output or the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.quantized import draw
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
IN, OUT, TOKENS = 512, 384, 96
PLAIN = {"q": slice(0, OUT)}
FUSED = {"q": slice(0, 128), "v": slice(256, 384)}
"""Rows of a fused q/k/v linear: k, in the middle, is not adapted."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> float:
    """Return the allowed relative error: four roundings, or another order of `IN` summands."""
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


def output_and_gradients(
    layer: QuantLinear | LoraLinear, x: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Return output and gradients by name, in float32 on the CPU."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    found = {"y": y.detach(), "x": x.grad, **trained}
    return {name: t.to(CPU).float() for name, t in found.items() if t is not None}


def compare(
    reference: QuantLinear | LoraLinear,
    layer: QuantLinear | LoraLinear,
    gpu: torch.device,
    dtype: torch.dtype,
    allowed: float,
) -> None:
    """Compare outputs and gradients. Both layers get inputs that are rounded to `dtype`."""
    x, grad = draw(TOKENS, IN, seed=2).to(dtype), draw(TOKENS, OUT, seed=3).to(dtype)
    wanted = output_and_gradients(reference, x.float(), grad.float())
    found = output_and_gradients(layer.to(gpu), x.to(gpu), grad.to(gpu))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        error = ((found[name] - value).norm() / value.norm()).item()
        print(f"{name}: {error:.2e}, allowed {allowed:.2e}")
        assert error < allowed, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_packed_linear(gpu: torch.device, bits: int, bias: bool, dtype: torch.dtype) -> None:
    reference = frozen(bits, torch.float32, bias)
    compare(reference, frozen(bits, dtype, bias), gpu, dtype, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_product_of_a_token(gpu: torch.device, bias: bool, dtype: torch.dtype) -> None:
    x = draw(1, IN, seed=2).to(dtype)
    wanted = frozen(4, torch.float32, bias).product(x.float())
    layer = frozen(4, dtype, bias).to(gpu)
    layer.fuse_token_product()
    found = layer.product(x.to(gpu)).to(CPU).float()
    assert (found - wanted).norm() / wanted.norm() < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_an_8_bit_linear(gpu: torch.device, outliers: bool, dtype: torch.dtype) -> None:
    """Both devices round the input to 8 bits; a tie may get either code."""
    reference, layer = frozen(8, torch.float32), frozen(8, dtype).to(gpu)
    x = draw(TOKENS, IN, seed=2).to(dtype)
    if outliers:
        x[:, [7, 300]] *= 20
    wanted = reference.product(x.float())
    found = layer.product(x.to(gpu)).to(CPU).float()
    assert (found - wanted).norm() / wanted.norm() < tolerance(dtype) + 2e-3
    grad = draw(TOKENS, OUT, seed=3).to(dtype)
    own = layer.grad_input(grad.to(gpu)).to(CPU).float()
    other = reference.grad_input(grad.float())
    assert (own - other).norm() / other.norm() < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("bits", [4, 16])
def test_an_adapted_linear(
    gpu: torch.device, bits: int, parts: Mapping[str, slice], dtype: torch.dtype
) -> None:
    reference = adapted(bits, torch.float32, parts, torch.float32)
    layer = adapted(bits, dtype, parts, torch.float32)
    compare(reference, layer, gpu, dtype, tolerance(dtype))


def test_the_comparison_detects_a_wrong_scale(gpu: torch.device) -> None:
    """One constant is wrong by 5 %, in the dtype with the largest rounding errors."""
    reference = frozen(4, torch.float32)
    layer = frozen(4, torch.bfloat16)
    assert layer.offset_of_scale is not None
    layer.offset_of_scale.data *= 1.05
    with pytest.raises(AssertionError):
        compare(reference, layer, gpu, torch.bfloat16, tolerance(torch.bfloat16))


def test_a_seed_gives_the_same_adapter_on_the_gpu(gpu: torch.device) -> None:
    own, other = (adapted(4, torch.float32, PLAIN, torch.float32) for _ in range(2))
    other.initialize(gpu, torch.Generator().manual_seed(1))
    own.initialize(CPU, torch.Generator().manual_seed(1))
    assert torch.equal(own.lora_a["q"], other.lora_a["q"].to(CPU))
