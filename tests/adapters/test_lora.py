"""The product of a LoRA layer equals that of plain modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.nn.lora_matmul import draw_seed
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.runs import (
    CPU,
)

PLAIN = {"q": slice(0, 48)}
FUSED = {"q": slice(0, 16), "v": slice(32, 48)}
"""Slices of a fused q/k/v projection with 48 rows: k in the middle has no adapter."""


def adapted(
    parts: Mapping[str, slice],
    *,
    bits: int = 4,
    compute: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    rslora: bool = False,
) -> LoraLinear:
    """Return an adapted linear (48, 64) with values in A and B."""
    generator = torch.Generator().manual_seed(1)
    base = QuantLinear(64, 48, False, WeightFormat(bits, compute, compute))
    base.pack(torch.randn(48, 64, generator=generator).to(compute if bits == 16 else torch.float32))
    layer = LoraLinear(base, parts, LoraSettings(4, 6.0, dropout, dtype, rslora))
    layer.initialize(CPU, generator)
    for b in layer.lora_b.values():
        b.data.copy_(torch.randn(b.shape, generator=generator))
    return layer


def composed(layer: LoraLinear, x: Tensor, dropped: Tensor) -> Tensor:
    """Return the output of the layer, computed with plain differentiable operations."""
    y = x @ layer.base.dequantize().t()
    for role, rows in layer.lora_slices.items():
        part = dropped @ layer.lora_a[role].t() @ layer.lora_b[role].t()
        y = y + functional.pad(part, (rows.start, y.shape[1] - rows.stop)) * layer.settings.scaling
    return y


def gradients(y: Tensor, layer: LoraLinear, x: Tensor) -> list[Tensor]:
    inputs = [x, *layer.lora_a.values(), *layer.lora_b.values()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum() + y.square().sum(), inputs))


def keep_mask(x: Tensor, dropout: float) -> Tensor:
    """Return the mask of kept values that the next call of a layer with dropout uses."""
    generator = torch.Generator().manual_seed(draw_seed())
    return ~torch.empty(x.shape, dtype=torch.bool).bernoulli_(dropout, generator=generator)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_equal_plain_modules_in_float64(
    parts: Mapping[str, slice], dropout: float, rslora: bool
) -> None:
    layer = adapted(parts, bits=16, dropout=dropout, rslora=rslora)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    ours = layer(x)
    torch.manual_seed(11)
    flat = x.reshape(-1, 64)
    dropped = flat * keep_mask(flat, dropout) / (1 - dropout) if dropout else flat
    wanted = composed(layer, flat, dropped).view(3, 5, 48)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    for own, other in zip(gradients(ours, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_on_a_packed_base(bits: int) -> None:
    layer = adapted(FUSED, bits=bits, compute=torch.float32, dtype=torch.float32)
    x = torch.randn(7, 64, requires_grad=True)
    ours, wanted = layer(x), composed(layer, x, x)
    if bits == 8:
        # 8 bit rounds its input; with equal outputs both get the same gradient.
        wanted = wanted + (ours - wanted).detach()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for own, other in zip(gradients(ours, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_lora_passes_gradcheck() -> None:
    layer = adapted(FUSED, bits=16)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    factors = [*layer.lora_a.values(), *layer.lora_b.values()]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors), fast_mode=True)


def test_gradcheck_detects_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(PLAIN, bits=16)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(
        QuantLinear, "grad_input", lambda self, grad, total=None: 1.01 * grad @ self.dequantize()
    )
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_dropout_draws_a_new_mask_in_each_call_and_only_in_training() -> None:
    layer = adapted(PLAIN, bits=16, dropout=0.3)
    layer.base.weight.data.zero_()
    eye = torch.eye(64, dtype=torch.float64)
    torch.manual_seed(0)
    outputs = [layer(eye) for _ in range(40)]
    assert not torch.equal(outputs[0], outputs[1])
    zero = torch.stack([(one == 0).all(dim=1) for one in outputs]).double()
    # Row i of A^T B^T is zero if entry i of the unit vector is dropped: 2560 draws.
    assert zero.mean().item() == pytest.approx(0.3, abs=0.03)
    layer.eval()
    torch.testing.assert_close(layer(eye), layer.delta().t().double(), rtol=1e-5, atol=1e-5)
    there = outputs[0][~zero[0].bool()]
    torch.testing.assert_close(there, layer(eye)[~zero[0].bool()] / 0.7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_x_and_x_a_are_saved_for_backward(dropout: float) -> None:
    layer = adapted(FUSED, dropout=dropout)
    x = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    factors = [tuple(factor.shape) for role in FUSED for factor in layer._factors(role)]
    # The x A^T of both adapters are one tensor.
    assert sorted(shapes) == sorted([(9, 64), (9, 8), *factors])


def test_delta_is_scaling_b_a() -> None:
    for rslora, scaling in ((False, 6.0 / 4), (True, 6.0 / math.sqrt(4))):
        layer = adapted(FUSED, rslora=rslora, dtype=torch.float32)
        delta = layer.delta()
        for role, rows in FUSED.items():
            wanted = scaling * layer.lora_b[role] @ layer.lora_a[role]
            torch.testing.assert_close(delta[rows], wanted.detach(), rtol=1e-6, atol=1e-6)
        assert not delta[16:32].any(), "k has no adapter"


def test_float16_adapters_are_the_float32_ones_rounded() -> None:
    exact = adapted(FUSED, compute=torch.float32, dtype=torch.float32)
    half = adapted(FUSED, compute=torch.float32, dtype=torch.float16)
    for role in FUSED:
        assert half.lora_a[role].dtype == torch.float16
        exact.lora_a[role].data.copy_(half.lora_a[role])
        exact.lora_b[role].data.copy_(half.lora_b[role])
    x = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(half(x), exact(x))
    for own, other in zip(gradients(half(x), half, x), gradients(exact(x), exact, x), strict=True):
        torch.testing.assert_close(own.float(), other, rtol=1e-3, atol=1e-3)


def test_a_seed_gives_a_and_a_is_gaussian() -> None:
    settings = LoraSettings(64, 8.0, 0.0, torch.float32, False)
    layer = LoraLinear(
        QuantLinear(1024, 8, False, WeightFormat(4, torch.float32, torch.float16)),
        {"q": slice(0, 8)},
        settings,
    )
    drawn = []
    for _ in range(2):
        layer.initialize(CPU, torch.Generator().manual_seed(3))
        drawn.append(layer.lora_a["q"].detach())
    assert torch.equal(*drawn)
    assert not layer.lora_b["q"].any()
    assert drawn[0].std() == pytest.approx(1024**-0.5, rel=0.02)
    # The fourth moment is 3 times the squared variance (Gaussian) or 1.8 times (uniform).
    assert (drawn[0] ** 4).mean() / drawn[0].var() ** 2 == pytest.approx(3.0, rel=0.05)
