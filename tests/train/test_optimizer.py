"""AdamW is torch's, float16 loses no update, schedules end well, overflow is survived."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.schema import Train
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.loss_scale import LossScale
from qlora_cli.train.optimizer import make_optimizer
from qlora_cli.train.schedule import learning_rate
from tests.helpers.runs import CPU


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(70, 65), (5,), (3, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(step: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 + step)).to(
        like.dtype
    )


def steps_of(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], num: int = 6) -> None:
    for step in range(num):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for parameter in trained:
            parameter.grad = gradient(step, parameter)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torch_s_own(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    steps_of(AdamW(ours, weight_decay), ours)
    steps_of(torch.optim.AdamW(theirs, weight_decay=weight_decay), theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_adamw_by_its_equations() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, one scalar in float64."""
    weight = nn.Parameter(torch.tensor([0.5]))
    optimizer = AdamW([weight], 0.1)
    x, m, v = 0.5, 0.0, 0.0
    for step in range(1, 6):
        g = math.sin(step)
        weight.grad = torch.tensor([g])
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        x = x - 1e-2 * 0.1 * x - 1e-2 * update
    assert weight.item() == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_follow_a_float32_master(dtype: torch.dtype) -> None:
    """Each is its master rounded, and the master is what float32 training gives."""
    half, exact = parameters(dtype), parameters(dtype)
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    optimizer, reference = AdamW(half, 0.0), AdamW(exact, 0.0)
    for step in range(4):
        for own, other in zip(half, exact, strict=True):
            own.grad = gradient(step, own)
            other.grad = own.grad.float()
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 1e-3
            one.step()
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
    optimizer.param_groups[0]["lr"] = 1e-4
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.99), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_loss_scale_is_taken_off_in_float32(dtype: torch.dtype) -> None:
    """Gradients of 1e-7 vanish in float16; unscaled, they must not fall back into it."""
    true = 1e-7
    assert torch.tensor(true, dtype=torch.float16).item() != pytest.approx(true, rel=0.1)
    moments = []
    for scale in (1.0, 2.0**16):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float32 if scale == 1.0 else dtype))
        optimizer = AdamW([weight], 0.0)
        optimizer.param_groups[0].update(lr=1e-3, grad_factor=1 / scale)
        weight.grad = torch.full_like(weight, true * scale)
        optimizer.step()
        moments.append(optimizer.state[weight]["exp_avg"])
    torch.testing.assert_close(*moments, rtol=1e-3, atol=0)


def test_parameters_without_gradient_stay() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first.grad = torch.ones(2)
    optimizer = AdamW([first, second], 0.1)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.equal(second, torch.ones(2))
    assert second not in optimizer.state


def test_adamw8bit_trains_on_a_cpu_and_holds_its_states_in_8_bit() -> None:
    trained = parameters()
    before = [p.detach().clone() for p in trained]
    optimizer = make_optimizer(Train(optimizer="adamw8bit"), trained, CPU)
    steps_of(optimizer, trained, 3)
    assert optimizer.state[trained[0]]["state1"].dtype == torch.uint8
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    reference = parameters()
    steps_of(AdamW(reference, 0.0), reference, 3)
    moved = torch.cat(
        [(p - old).detach().flatten() for p, old in zip(trained, before, strict=True)]
    )
    wanted = torch.cat(
        [(p - old).detach().flatten() for p, old in zip(reference, before, strict=True)]
    )
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.99


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paging_without_a_card_is_refused(name: Any) -> None:
    with pytest.raises(RecipeError, match=f"train.optimizer: {name} .* no GPU"):
        make_optimizer(Train(optimizer=name), parameters(), CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_optimizer_that_loses_updates_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RecipeError, match="no float32 copy of a 16-bit weight"):
        make_optimizer(Train(optimizer="adamw8bit"), parameters(dtype), CPU)


def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
    train = Train(lr=1.0, schedule=schedule, warmup=warmup)
    return [learning_rate(train, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_in_equal_steps(schedule: Any) -> None:
    found = rates(schedule, 0.1, 100)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1.0
    assert max(found) == 1.0


def test_cosine_falls_to_nothing() -> None:
    found = rates("cosine", 0.0, 100)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 1e-3
    assert learning_rate(Train(lr=1.0, warmup=0.0), 100, 100) == pytest.approx(0.0)


def test_linear_falls_in_equal_steps_and_constant_stays() -> None:
    assert rates("linear", 0.0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates("constant", 0.25, 4) == pytest.approx([1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_no_step_has_no_or_a_negative_rate(schedule: Any, steps: int, warmup: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(schedule, warmup, steps))


def test_the_loss_scale_halves_and_recovers() -> None:
    scale = LossScale(needed=True)
    first = scale.value
    scale.update(finite=False)
    assert scale.value == first / 2
    for _ in range(LossScale.PATIENCE - 1):
        scale.update(finite=True)
    assert scale.value == first / 2
    scale.update(finite=True)
    assert scale.value == first
    assert not scale.exhausted


def test_an_overflow_begins_the_patience_anew() -> None:
    scale = LossScale(needed=True)
    for finite in [True] * (LossScale.PATIENCE - 1) + [False] + [True] * (LossScale.PATIENCE - 1):
        scale.update(finite)
    assert scale.value == LossScale.FIRST / 2


def test_the_loss_scale_gives_up_where_halving_does_not_help() -> None:
    scale = LossScale(needed=True)
    halvings = 0
    while not scale.exhausted:
        scale.update(finite=False)
        halvings += 1
    assert halvings == 31
    assert LossScale(needed=False).exhausted, "without float16 there is nothing to halve"


def test_an_idle_loss_scale_stays_one() -> None:
    scale = LossScale(needed=False)
    for finite in (True, False, True):
        scale.update(finite)
    assert scale.value == 1.0


def test_the_loss_scale_survives_a_checkpoint() -> None:
    scale, other = LossScale(needed=True), LossScale(needed=True)
    for finite in (False, True, True):
        scale.update(finite)
    other.restore(scale.state())
    assert other.state() == scale.state()
