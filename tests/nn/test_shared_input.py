"""Linears with the same input are computed together, with the results of separate ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.data.collate import largest_batch
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn import lora_product, mlp
from qlora_cli.nn.lora_product import joined, outputs_of
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, randomize_b

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ALL = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl")
    for family in FAMILIES:
        make_base(folder / family, family, spread=0.1)
    return folder


def make(bases: Path, family: str = "llama", **sections: object) -> LoadedModel:
    loaded = build_base(make_recipe(bases / family, bases / "rows.jsonl", **sections))
    randomize_b(loaded)
    loaded.model.train()
    return loaded


def step_of(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the loss and every gradient of one batch."""
    torch.manual_seed(5)
    loss = CAUSAL.loss(loaded, largest_batch(24, 2, 250), CPU, 1 / 46)
    loss.backward()
    found = {name: p.grad for name, p in loaded.trainable().items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every product of several linears adds their number."""
    calls: list[int] = []
    forward = lora_product._LoraProduct.forward

    def counting(ctx: object, x: Tensor, matmul: object, *factors: Tensor) -> object:
        calls.append(len(matmul.bases))  # type: ignore[attr-defined]
        return forward(ctx, x, matmul, *factors)

    monkeypatch.setattr(lora_product._LoraProduct, "forward", staticmethod(counting))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [ALL, ["q", "v"]])
def test_joined_products_equal_separate_ones(
    bases: Path, monkeypatch: pytest.MonkeyPatch, family: str, targets: list[str]
) -> None:
    sections = {"adapter": {"targets": targets}, "train": {"activation_checkpointing": False}}
    calls = count_calls(monkeypatch)
    found = step_of(make(bases, family, **sections))
    # q, k and v of two blocks; gate and up, if they are adapted; o alone.
    assert sorted(calls) == sorted([3, 3] + ([2, 2, 1, 1] if targets == ALL else []))
    for module in (lora_product, mlp):
        monkeypatch.setattr(module, "outputs_of", lambda ms, x: [m(x) for m in ms])
    monkeypatch.setattr(convert, "share_input", lambda *_: None)
    calls.clear()
    wanted = step_of(make(bases, family, **sections))
    assert set(calls) == {1}
    assert found.keys() == wanted.keys()
    for name, own in found.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(own, wanted[name], rtol=1e-5, atol=1e-5 * scale)


def test_what_cannot_be_joined_is_computed_separately(bases: Path) -> None:
    attention = "model.layers.0.self_attn"
    names = ("q_proj", "k_proj", "v_proj")

    def linears(**adapter: object) -> list[nn.Module]:
        loaded = make(bases, adapter={"targets": ALL, **adapter})
        return [loaded.model.get_submodule(f"{attention}.{name}") for name in names]

    plain = linears()
    assert joined(plain) is not None
    assert joined(plain[:1]) is None
    assert joined([linear.base for linear in plain]) is None, "nothing is adapted"
    assert joined(linears(dropout=0.1)) is None
    assert joined(linears(method="dora")) is None
    mixed = linears()
    assert isinstance(mixed[1], LoraLinear)
    mixed[1].settings = make_settings(mixed[1], alpha=99.0)
    assert joined(mixed) is None, "another scaling"
    hooked = linears()
    seen: list[int] = []
    hooked[2].register_forward_hook(lambda *_: seen.append(1))
    outputs_of(hooked, torch.randn(1, 3, plain[0].base.in_features))
    assert seen == [1]


def make_settings(linear: LoraLinear, alpha: float) -> object:
    from dataclasses import replace

    return replace(linear.settings, alpha=alpha)


def test_the_product_of_down_is_not_recomputed(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputed block ends when its last tensor is saved."""
    products: dict[int, int] = {}
    product = QuantLinear.product

    def counting(self: QuantLinear, x: Tensor) -> Tensor:
        products[id(self)] = products.get(id(self), 0) + 1
        return product(self, x)

    loaded = make(bases, adapter={"targets": ALL}, train={"activation_checkpointing": True})
    monkeypatch.setattr(QuantLinear, "product", counting)
    step_of(loaded)
    for block in loaded.model.model.layers:
        counts = {
            name: products[id(module)]
            for name, module in block.named_modules()
            if isinstance(module, QuantLinear)
        }
        assert counts.pop("mlp.down_proj.base") == 1
        assert set(counts.values()) == {2}


def test_different_inputs_of_the_projections_are_an_error(bases: Path) -> None:
    loaded = make(bases, adapter={"targets": ALL})
    attention = loaded.model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    step_of(loaded)  # Hooks make the products separate.
    attention.k_proj._forward_pre_hooks.clear()
    k_forward = type(attention.k_proj).__call__

    def changed(self: nn.Module, x: Tensor) -> object:
        return k_forward(self, x + 1 if self is attention.k_proj else x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLinear, "__call__", changed, raising=False)
        with pytest.raises(AssertionError, match="different inputs"):
            step_of(loaded)
    assert "forward" not in vars(attention.q_proj), "nothing is left behind"
