"""Adapter methods are chosen by name, and a new one needs no change elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.adapters import registry
from qlora_cli.adapters.full import FullFineTuning
from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.lora_method import LoraMethod
from qlora_cli.adapters.method import AdapterMethod
from qlora_cli.adapters.targets import adapted_roles
from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import Adapter
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows

IDS = torch.arange(5, 29)[None]


def test_every_method_of_the_recipe_is_registered() -> None:
    names = get_args(Adapter.model_fields["method"].annotation)
    assert set(registry.METHODS) == set(names)
    for name in names:
        assert registry.method_of(Adapter(method=name)).name == name


def test_a_method_has_the_settings_of_the_recipe() -> None:
    section = Adapter(rank=3, alpha=5.0, dropout=0.1, targets=["q"], dtype="float16")
    settings = LoraSettings(3, 5.0, 0.1, torch.float16, False)
    assert registry.method_of(section) == LoraMethod(["q"], settings)
    assert registry.method_of(Adapter(method="full")) == FullFineTuning()


class ShiftLinear(AdaptedLinear):
    """y = x W^T + b + shift: a toy adapter with one trained vector."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.base = base

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        self.shift = nn.Parameter(torch.zeros(self.base.out_features, device=device))

    def start_matmul(self) -> tuple[LoraMatmul, list[Tensor]]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.shift  # type: ignore[no-any-return]


class ShiftMethod:
    """Trains one vector for each adapted linear of the attention."""

    name = "lora"
    freezes_base = True

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        return adapted_roles(sites, ["q", "v"])

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> AdaptedLinear:
        return ShiftLinear(linear)

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        for layer in self._layers(model):
            layer.initialize(device, torch.Generator().manual_seed(seed))

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        return (layer.shift for layer in self._layers(model))

    def lr_factors(self, model: nn.Module) -> dict[nn.Parameter, float]:
        return {}

    @staticmethod
    def _layers(model: nn.Module) -> list[ShiftLinear]:
        return [module for module in model.modules() if isinstance(module, ShiftLinear)]


def test_a_new_method_is_built_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method: AdapterMethod = ShiftMethod()
    monkeypatch.setitem(registry.METHODS, "lora", lambda section: method)
    base = make_base(tmp_path / "base", "llama")
    loaded = build_base(make_recipe(base, make_rows(tmp_path / "rows.jsonl")), CPU)
    trained = loaded.trainable()
    assert len(trained) == 4, "q and v of two blocks"
    assert all(name.endswith(".shift") for name in trained)
    before = logits(loaded, IDS)
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    backbone(input_ids=IDS, use_cache=False).last_hidden_state.square().sum().backward()
    torch.optim.SGD(trained.values(), lr=1e-2).step()
    assert not torch.equal(logits(loaded, IDS), before)
    assert all(p.grad is None for p in loaded.model.parameters() if not p.requires_grad)
