"""The MLP equals transformers' in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.nn import mlp as mlp_file
from qlora_cli.nn.mlp import ACTIVATIONS, Mlp, Projections
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.gradients import draw, grads
from tests.helpers.runs import CPU

HIDDEN, WIDTH, TOKENS, RANK = 64, 96, 11, 3
GATED, PLAIN = Projections("gate", "up", "down"), Projections(None, "up", "down")


def linear(
    inputs: int, outputs: int, seed: int, bits: int, dtype: torch.dtype, dropout: float | None
) -> LoraLinear | QuantLinear:
    """Return a packed linear, with an adapter if a dropout is given."""
    base = QuantLinear(inputs, outputs, bias=True, weight_format=WeightFormat(bits, dtype, dtype))
    weight = draw(outputs, inputs, seed=seed) / inputs**0.5
    base.pack(weight.to(dtype) if bits == 16 else weight)
    base.bias = nn.Parameter(draw(outputs, dtype=dtype, seed=seed + 1), requires_grad=False)
    if dropout is None:
        return base
    layer = LoraLinear(
        base, {"part": slice(0, outputs)}, LoraSettings(RANK, 6.0, dropout, dtype, False)
    )
    layer.initialize(CPU, torch.Generator().manual_seed(seed))
    layer.lora_b["part"].data.copy_(draw(outputs, RANK, seed=seed + 2))
    return layer


class Composed(nn.Module):
    """transformers' MLP, with and without a gate, over the given linears."""

    def __init__(self, names: Projections, activation: str, layers: dict[str, Any]) -> None:
        super().__init__()
        self.names = names
        self.act = ACT2FN[activation]
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.get_submodule(self.names.gate or self.names.up)(x))
        if self.names.gate is not None:
            inner = inner * self.get_submodule(self.names.up)(x)
        return self.get_submodule(self.names.down)(inner)  # type: ignore[no-any-return]


def mlps(
    names: Projections,
    activation: str,
    *,
    bits: int = 16,
    dtype: torch.dtype = torch.float64,
    adapted: str = "gate up down",
    dropout: float = 0.0,
) -> tuple[Composed, Mlp]:
    """Return (composed MLP, ours) over the same linears."""
    layers = {}
    for seed, name in enumerate(name for name in ("gate", "up", "down") if getattr(names, name)):
        inputs, outputs = (WIDTH, HIDDEN) if name == "down" else (HIDDEN, WIDTH)
        own = dropout if name in adapted.split() else None
        layers[name] = linear(inputs, outputs, 10 * seed, bits, dtype, own)
    theirs = Composed(names, activation, layers)
    return theirs, Mlp(theirs, names, ACTIVATIONS[activation])


KINDS = [(GATED, "silu"), (GATED, "gelu"), (PLAIN, "gelu_new"), (PLAIN, "gelu_pytorch_tanh")]


@pytest.fixture(params=[1, 40 * WIDTH])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute gradients one row at a time, and all rows at once."""
    monkeypatch.setattr(mlp_file, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("adapted", ["gate up down", "gate", "down", ""])
@pytest.mark.parametrize(("names", "activation"), KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_mlp_equals_transformers(
    names: Projections, activation: str, adapted: str, bits: int
) -> None:
    theirs, ours = mlps(names, activation, bits=bits, dtype=torch.float32, adapted=adapted)
    x = draw(2, TOKENS, HIDDEN).requires_grad_()
    inputs = [x, *(p for p in ours.parameters() if p.requires_grad)]
    wanted, found = theirs(x), ours(x)
    # x is multiplied by the A of gate and up at once, which adds in another order. gelu_new is
    # composed in Python by transformers.
    tolerance = {"rtol": 0, "atol": 2e-6 * wanted.abs().max().item()}
    torch.testing.assert_close(found, wanted, **tolerance)
    for own, other in zip(grads(found, inputs), grads(wanted, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), found, **tolerance)


@pytest.mark.parametrize(("names", "activation"), [KINDS[0], KINDS[2]])
def test_dropout_of_the_adapters_equals_composed(names: Projections, activation: str) -> None:
    theirs, ours = mlps(names, activation, dropout=0.4)
    x = draw(TOKENS, HIDDEN, dtype=torch.float64).requires_grad_()
    inputs = [x, *(p for p in ours.parameters() if p.requires_grad)]
    found = []
    for one in (theirs, ours):
        torch.manual_seed(3)
        y = one(x)
        found.append([y, *grads(y, inputs)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    assert not torch.equal(ours(x), ours(x)), "dropout must have an effect"


@pytest.mark.parametrize(("names", "activation"), KINDS)
def test_mlp_passes_gradcheck(names: Projections, activation: str) -> None:
    _, ours = mlps(names, activation)
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    trained = [p for p in ours.parameters() if p.requires_grad]

    # gradcheck runs several backward passes; a checkpoint recomputes the overwritten tensors.
    def fresh(x: Tensor, *_: Tensor) -> Any:
        return checkpoint(ours, x, use_reentrant=False)

    assert torch.autograd.gradcheck(fresh, (x, *trained), fast_mode=True)


def test_gradcheck_detects_a_wrong_mlp_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = mlps(*KINDS[0])
    monkeypatch.setattr(
        mlp_file, "_grad_gate_and_up", lambda _, grad, gate, up, __: (grad, up.detach())
    )
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(
            lambda x: checkpoint(ours, x, use_reentrant=False), (x,), fast_mode=True
        )


def test_a_second_backward_pass_raises_an_error() -> None:
    _, ours = mlps(*KINDS[0])
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    y = ours(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
