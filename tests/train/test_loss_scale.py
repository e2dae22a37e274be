"""The float16 loss scale: halving, doubling, giving up, checkpoints."""

from __future__ import annotations

from qlora_cli.train.loss_scale import LossScale


def test_the_loss_scale_is_halved_and_doubled_again() -> None:
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


def test_an_overflow_restarts_the_patience() -> None:
    scale = LossScale(needed=True)
    for finite in [True] * (LossScale.PATIENCE - 1) + [False] + [True] * (LossScale.PATIENCE - 1):
        scale.update(finite)
    assert scale.value == LossScale.FIRST / 2


def test_the_loss_scale_is_exhausted_if_halving_does_not_help() -> None:
    scale = LossScale(needed=True)
    halvings = 0
    while not scale.exhausted:
        scale.update(finite=False)
        halvings += 1
    assert halvings == 31
    assert LossScale(needed=False).exhausted, "without float16 there is nothing to halve"


def test_a_loss_scale_that_is_not_needed_stays_one() -> None:
    scale = LossScale(needed=False)
    for finite in (True, False, True):
        scale.update(finite)
    assert scale.value == 1.0


def test_the_loss_scale_is_restored_from_a_checkpoint() -> None:
    scale, other = LossScale(needed=True), LossScale(needed=True)
    for finite in (False, True, True):
        scale.update(finite)
    other.restore(scale.state())
    assert other.state() == scale.state()
