"""AdamW: the arithmetic of torch's, float32 master weights, exact restoring."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from qlora_cli.train.adamw import AdamW
from tests.helpers.optimizers import gradient, parameters, steps_of


class TorchAdamW(torch.optim.AdamW):
    def apply(self, factor: float, lr: float) -> None:
        assert factor == 1.0
        self.param_groups[0]["lr"] = lr
        self.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_adamw(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    steps_of(AdamW(ours, weight_decay), ours)
    steps_of(TorchAdamW(theirs, weight_decay=weight_decay), theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_adamw_follows_its_equations() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, one scalar in float64."""
    weight = nn.Parameter(torch.tensor([0.5]))
    optimizer = AdamW([weight], 0.1)
    x, m, v = 0.5, 0.0, 0.0
    for step in range(1, 6):
        g = math.sin(step)
        weight.grad = torch.tensor([g])
        optimizer.apply(1.0, 1e-2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        x = x - 1e-2 * 0.1 * x - 1e-2 * update
    assert weight.item() == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_rounded_from_a_float32_master(dtype: torch.dtype) -> None:
    """Each is its master rounded, and the master is what float32 training gives."""
    half, exact = parameters(dtype), parameters(dtype)
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    optimizer, reference = AdamW(half, 0.0), AdamW(exact, 0.0)
    for step in range(4):
        for own, other in zip(half, exact, strict=True):
            own.grad = gradient(step, own)
            other.grad = own.grad.float()
        for adamw in (optimizer, reference):
            adamw.apply(1.0, 1e-3)
    for own, other in zip(half, exact, strict=True):
        master = optimizer.state[own]["master"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(own, master.to(dtype))


def test_small_updates_add_up_in_float16() -> None:
    """1 - 1e-4 rounds to 1 in float16: a hundred such updates are lost without a master."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    assert torch.equal(weight.detach() - 1e-4, torch.ones(4, dtype=torch.float16))
    optimizer = AdamW([weight], 0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.apply(1.0, 1e-4)
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.99), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_are_unscaled_in_float32(dtype: torch.dtype) -> None:
    """Gradients of 1e-7 vanish in float16; unscaled, they must not fall back into it."""
    true = 1e-7
    assert torch.tensor(true, dtype=torch.float16).item() != pytest.approx(true, rel=0.1)
    moments = []
    for scale in (1.0, 2.0**16):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float32 if scale == 1.0 else dtype))
        optimizer = AdamW([weight], 0.0)
        weight.grad = torch.full_like(weight, true * scale)
        optimizer.apply(1 / scale, 1e-3)
        moments.append(optimizer.state[weight]["exp_avg"])
    torch.testing.assert_close(*moments, rtol=1e-3, atol=0)


def test_parameters_without_a_gradient_do_not_change() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first.grad = torch.ones(2)
    optimizer = AdamW([first, second], 0.1)
    optimizer.apply(1.0, 0.1)
    assert torch.equal(second, torch.ones(2))
    assert second not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loading_restores_every_state_exactly(dtype: torch.dtype) -> None:
    """torch's own loader would round the states of a float16 parameter to float16."""
    trained = parameters(dtype)
    optimizer = AdamW(trained, 0.1)
    steps_of(optimizer, trained, 2)
    saved = deepcopy(optimizer.state_dict())
    restored = AdamW(trained, 0.1)
    restored.load_state_dict(deepcopy(saved))
    for parameter in trained:
        for key, value in optimizer.state[parameter].items():
            assert restored.state[parameter][key].dtype == value.dtype
            assert torch.equal(restored.state[parameter][key], value)
