"""The norm and MLP of a block equal transformers' in values and gradients, and save less memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.data.collate import largest_batch
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn import mlp as mlp_file
from qlora_cli.nn.mlp import ACTIVATIONS, Mlp, Projections
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.nn.quant import QuantLinear, WeightFormat
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, randomize_b

HIDDEN, WIDTH, TOKENS, RANK = 64, 96, 11, 3
GATED, PLAIN = Projections("gate", "up", "down"), Projections(None, "up", "down")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def grads(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    return list(torch.autograd.grad(y, inputs, weights))


def norms(dtype: torch.dtype) -> tuple[nn.Module, RmsNorm]:
    """Return (transformers' norm, ours) with the same weight."""
    theirs = LlamaRMSNorm(HIDDEN, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(1 + 0.3 * draw(HIDDEN))
    theirs.requires_grad_(False)
    return theirs, RmsNorm(theirs.weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
def test_norm_equals_transformers_bit_for_bit_and_in_gradient(
    dtype: torch.dtype, spread: float
) -> None:
    theirs, ours = norms(dtype)
    x = (spread * draw(2, TOKENS, HIDDEN)).to(dtype).requires_grad_()
    wanted, found = theirs(x), ours(x)
    assert torch.equal(wanted, found)
    (own,), (other,) = grads(found, [x]), grads(wanted, [x])
    assert own.dtype == dtype
    # Two sums of d float32 products are added in another order, then rounded to dtype once.
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(own, other, rtol=2 * eps, atol=2 * eps * other.abs().max().item())


def test_norm_passes_gradcheck() -> None:
    _, ours = norms(torch.float64)
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ours, (x,))


def test_gradcheck_detects_a_wrong_norm_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = norms(torch.float64)
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr("qlora_cli.nn.norm.Tensor.pow", lambda self, _: self, raising=False)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(ours, (x,))


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
    # The kernels are the same, except for gelu_new, which transformers composes in Python.
    scale = 1e-6 if activation == "gelu_new" else 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=scale * wanted.abs().max().item())
    for own, other in zip(grads(found, inputs), grads(wanted, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())
    with torch.no_grad():
        assert torch.equal(ours(x), found)


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
        mlp_file, "_grad_gate_and_up", lambda _, grad, gate, up: (grad, up.detach())
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl")
    for family in MODEL_TYPES:
        make_base(folder / family, family, spread=0.1)
    return folder


def make(bases: Path, family: str, **sections: Any) -> LoadedModel:
    loaded = build_base(make_recipe(bases / family, bases / "rows.jsonl", **sections))
    randomize_b(loaded)
    loaded.model.train()
    return loaded


def with_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("replace_norms", "replace_mlps"):
        monkeypatch.setattr(convert, name, lambda *_: None)


def step_of(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the loss and every gradient of one batch."""
    torch.manual_seed(5)
    loss = CAUSAL.loss(loaded, largest_batch(24, 2, 250), CPU, 1 / 46)
    loss.backward()
    found = {name: p.grad for name, p in loaded.trainable().items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize(
    ("dropout", "checkpointing", "bits"), [(0.0, True, 4), (0.3, True, 8), (0.3, False, 16)]
)
def test_a_step_equals_that_of_transformers_modules(
    bases: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dropout: float,
    checkpointing: bool,
    bits: int,
) -> None:
    sections = {
        "base": {"bits": bits},
        "adapter": {"dropout": dropout},
        "train": {"activation_checkpointing": checkpointing},
    }
    ours = make(bases, family, **sections)
    found = step_of(ours)
    with_transformers_own(monkeypatch)
    theirs = make(bases, family, **sections)
    assert any(isinstance(module, Mlp) for module in ours.model.modules())
    assert not any(isinstance(module, Mlp | RmsNorm) for module in theirs.model.modules())
    wanted = step_of(theirs)
    assert found.keys() == wanted.keys() == {"loss", *ours.trainable()}
    for name, own in found.items():
        # 8 bit amplifies some differences of 1e-7 to a step of 1/127.
        scale = 1e-5 if bits == 4 or bits == 16 else 1e-2
        atol = scale * wanted[name].abs().max().item()
        torch.testing.assert_close(own, wanted[name], rtol=scale, atol=atol)


def test_full_fine_tuning_trains_transformers_own_modules(bases: Path) -> None:
    """The baseline of comparisons uses no module of this package."""
    loaded = make(bases, "llama", adapter={"method": "full"}, base={"bits": 16})
    assert not any(isinstance(module, Mlp | RmsNorm) for module in loaded.model.modules())


def test_every_norm_is_replaced(bases: Path) -> None:
    """A norm that a family forgets would save its float32 copies without any error."""
    for family in MODEL_TYPES:
        left = [
            m for m in make(bases, family).model.modules() if type(m).__name__.endswith("RMSNorm")
        ]
        assert not left, family


def test_an_mlp_with_an_unknown_activation_is_not_replaced(tmp_path: Path, bases: Path) -> None:
    base = make_base(tmp_path / "relu", "llama", hidden_act="relu")
    loaded = build_base(make_recipe(base, bases / "rows.jsonl"))
    assert not any(isinstance(module, Mlp) for module in loaded.model.modules())
    assert "loss" in step_of(loaded)


def saved_bytes(loaded: LoadedModel) -> int:
    """Return the bytes that a forward pass saves, without parameters and buffers."""
    apart = chain(loaded.model.parameters(), loaded.model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = hidden_states(loaded, largest_batch(48, 1, 250), CPU)
    del kept
    return sum(found.values())


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_third_less_is_saved_for_backward(
    bases: Path, monkeypatch: pytest.MonkeyPatch, family: str, dropout: float
) -> None:
    sections = {
        "base": {"compute_dtype": "bfloat16"},
        "adapter": {"dropout": dropout},
        "train": {"activation_checkpointing": False},
    }
    ours = saved_bytes(make(bases, family, **sections))
    with_transformers_own(monkeypatch)
    theirs = saved_bytes(make(bases, family, **sections))
    assert ours <= 0.7 * theirs


def test_dropout_saves_nothing_for_backward(bases: Path) -> None:
    sections = {"train": {"activation_checkpointing": False}}
    without, dropped = (
        saved_bytes(make(bases, "llama", adapter={"dropout": dropout}, **sections))
        for dropout in (0.0, 0.1)
    )
    assert without == dropped
