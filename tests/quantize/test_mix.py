"""Upgrades are chosen by estimated KL per byte, and a mix becomes `base.overrides`."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.models.base_format import BaseFormat
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.quantize.mix import LinearSize, Upgrade, mix_bytes, overrides_of, taken, upgrades

SIZES = [LinearSize(name, {4: 4 * n, 8: 8 * n, 16: 16 * n}) for name, n in (("a", 10), ("b", 1))]
ALONE = {"a": {4: 0.1, 8: 0.01}, "b": {4: 0.1, 8: 0.01}}


def test_the_gain_is_first_order_minus_what_both_formats_cost_alone() -> None:
    changes = {"a": {8: -0.3, 16: -0.2}, "b": {8: 0.05, 16: -0.3}}
    found = upgrades(SIZES, {"a": 4, "b": 4}, ALONE, changes)
    assert [(u.path, u.bits, u.num_bytes) for u in found] == [
        ("b", 16, 12),
        ("a", 8, 40),
        ("a", 16, 120),
    ]
    assert [u.gain for u in found] == pytest.approx([0.2, 0.19, 0.1])


def test_the_second_order_takes_back_half_of_the_gain_at_most() -> None:
    found = upgrades(SIZES, {"a": 4, "b": 4}, ALONE, {"a": {8: -0.04}, "b": {}})
    assert [upgrade.gain for upgrade in found] == pytest.approx([0.02])


def test_upgrades_are_taken_while_they_fit_one_per_linear() -> None:
    found = [Upgrade("a", 8, 3.0, 10), Upgrade("a", 16, 4.0, 30), Upgrade("b", 8, 1.0, 100)]
    found.append(Upgrade("c", 8, 0.1, 5))
    assert [u.path for u in taken(found, 15)] == ["a", "c"]
    assert [u.bits for u in taken(found, 1000)] == [8, 8, 8]
    assert [u.path for u in taken(found, 1000, gain=3.5)] == ["a", "b"]
    assert list(taken(found, 1000, gain=0.0)) == []


def test_overrides_give_each_linear_the_bits_of_the_mix() -> None:
    mix = {f"model.layers.{n}.mlp.{name}": 4 for n in range(12) for name in ("up", "down", "gate")}
    mix |= {path: 8 for path in mix if path.endswith(".down")}
    mix["model.layers.1.mlp.gate"] = 16
    overrides = overrides_of(mix)
    assert overrides == {"*.mlp.down": 8, "model.layers.1.mlp.gate": 16}
    default = WeightFormat(4, torch.float32, torch.float16)
    base_format = BaseFormat(default, tuple(overrides.items()))
    rows = {"x": slice(0, 1)}
    found = {p: base_format.of(Site(p, ("x",), rows, 1, 1, False, False)).bits for p in mix}
    assert found == mix


def test_the_bytes_of_a_mix() -> None:
    assert mix_bytes(SIZES, {"a": 8, "b": 4}) == 84
