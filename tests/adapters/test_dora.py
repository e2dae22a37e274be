"""DoRA layers: W' = m (W + s B A) / ||W + s B A||, its gradients, and the base at the start."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.adapters.dora import DoraLinear
from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.gradients import draw, grads
from tests.helpers.runs import CPU

WIDTH, HEIGHT, TOKENS = 64, 96, 5
PLAIN = {"all": slice(0, HEIGHT)}
FUSED = {"q": slice(0, 32), "v": slice(64, HEIGHT)}


def layer_of(
    bits: int, rows: Mapping[str, slice], dropout: float = 0.0, bias: bool = True
) -> DoraLinear:
    weight_format = WeightFormat(bits, torch.float32, torch.float16, threshold=0.0)
    base = QuantLinear(WIDTH, HEIGHT, bias, weight_format)
    base.pack(draw(HEIGHT, WIDTH))
    if bias:
        base.bias = nn.Parameter(draw(HEIGHT, seed=1), requires_grad=False)
    layer = DoraLinear(base, rows, LoraSettings(3, 5.0, dropout, torch.float32, False))
    layer.initialize(CPU, torch.Generator().manual_seed(0))
    return layer


def randomize(layer: DoraLinear) -> None:
    with torch.no_grad():
        for number, role in enumerate(layer.lora_slices):
            layer.lora_b[role].copy_(0.3 * draw(*layer.lora_b[role].shape, seed=5 + number))
            layer.lora_magnitude[role].mul_(1.5 + 0.1 * number)


def weight_of(layer: DoraLinear) -> Tensor:
    """Return W' by the formula of the paper; the length is a constant in the backward pass."""
    weight = layer.base.dequantize().clone()
    rows_of = []
    for role, rows in layer.lora_slices.items():
        update = layer.settings.scaling * layer.lora_b[role] @ layer.lora_a[role]
        total = weight[rows] + update
        length = total.detach().norm(dim=1, keepdim=True)
        rows_of.append((rows, layer.lora_magnitude[role][:, None] * total / length))
    for rows, part in rows_of:
        weight = torch.cat([weight[: rows.start], part, weight[rows.stop :]])
    return weight


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [PLAIN, FUSED], ids=["plain", "fused"])
def test_a_new_layer_equals_the_base(bits: int, rows: Mapping[str, slice]) -> None:
    layer, x = layer_of(bits, rows), draw(TOKENS, WIDTH)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)
    assert layer.delta().abs().max() < 1e-5


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("rows", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_output_and_gradients_are_those_of_the_formula(
    bits: int, rows: Mapping[str, slice], bias: bool
) -> None:
    layer = layer_of(bits, rows, bias=bias)
    randomize(layer)
    x = draw(TOKENS, WIDTH, seed=9).requires_grad_()
    trained = [*layer.lora_a.values(), *layer.lora_b.values(), *layer.lora_magnitude.values()]
    assert len(trained) == 3 * len(rows)
    expected = nn.functional.linear(x, weight_of(layer), layer.base.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(grads(y, [x, *trained]), grads(expected, [x, *trained]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_rows_of_the_adapted_weight_have_the_trained_lengths() -> None:
    layer = layer_of(4, FUSED)
    randomize(layer)
    merged = layer.base.dequantize() + layer.delta()
    for role, rows in FUSED.items():
        torch.testing.assert_close(merged[rows].norm(dim=1), layer.lora_magnitude[role].detach())
    assert torch.equal(merged[32:64], layer.base.dequantize()[32:64])
    torch.testing.assert_close(weight_of(layer).detach(), merged, rtol=1e-5, atol=1e-5)


def test_dropout_applies_to_the_input_of_a_only() -> None:
    layer = layer_of(16, PLAIN, dropout=0.5)
    x = draw(TOKENS, WIDTH)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)
    randomize(layer)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_frozen_lengths_are_computed_again_after_a_change() -> None:
    layer, x = layer_of(4, PLAIN), draw(TOKENS, WIDTH)
    layer.requires_grad_(False)
    before = layer(x)
    randomize(layer)
    layer.forget_lengths()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, weight_of(layer), layer.base.bias), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(before, layer(x), rtol=0.1)
