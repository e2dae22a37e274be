"""Finds the cheapest mix of 4, 8 and 16 bit by measuring, upgrading and measuring again.

The estimates of one measurement hold for few upgrades at a time, because the errors of linears act
together. So the bytes are spent in several rounds, and each is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.events import Observer
from qlora_cli.quantize.measurement import (
    Divergences,
    Measured,
    MeasuredBase,
    compare_format,
    measure_mix,
    measure_reference,
)
from qlora_cli.quantize.mix import LinearSize, Upgrade, mix_bytes, taken, upgrades

ROUNDS = 3
"""Rounds in which the bytes of a budget are spent."""
MAX_ROUNDS = 12
"""Rounds until a search for a KL gives up."""
_LEAST_RATE = 0.25
"""Share of the best gain per byte that an upgrade needs in one round of such a search."""


@dataclass(frozen=True)
class Step:
    """A mix that was measured. bits: by path. predicted: its KL by the estimates of the round."""

    bits: dict[str, int]
    num_bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    steps: the measured mixes, all 4 bit first. alone: estimated KL of each linear alone.
    kl_8bit: of the base in 8 bit. loss_16bit: mean cross entropy of the 16-bit model.
    """

    steps: tuple[Step, ...]
    alone: Divergences
    kl_8bit: float
    loss_16bit: float

    @property
    def plain(self) -> Step:
        """Return the base with all linears in 4 bit."""
        return self.steps[0]


def find_mix(
    base: MeasuredBase,
    sizes: Sequence[LinearSize],
    budget: int | None,
    target: float | None,
    observer: Observer,
) -> Found:
    """Search the mix of the lowest KL under a budget, or the cheapest one for a KL.

    budget: bytes in addition to 4 bit; None for any. target: stop when the measured KL is not
    larger; None to spend the budget.
    """
    reference, alone = measure_reference(base, observer)
    bits = {size.path: 4 for size in sizes}
    start = mix_bytes(sizes, bits)
    budget = (
        mix_bytes(sizes, {size.path: 16 for size in sizes}) - start if budget is None else budget
    )
    measured = measure_mix(base, bits, reference, observer)
    steps = [Step(bits, start, measured.kl, measured.kl)]
    rounds = ROUNDS if target is None else MAX_ROUNDS
    for number in range(1, rounds + 1):
        spent = steps[-1].num_bytes - start
        allowed = budget * number // ROUNDS if target is None else budget
        chosen = _upgrades(sizes, bits, alone, measured, allowed - spent, target)
        if not chosen:
            continue  # The next round may afford a larger linear.
        bits = bits | {upgrade.path: upgrade.bits for upgrade in chosen}
        predicted = measured.kl - sum(upgrade.gain for upgrade in chosen)
        if target is None and number == ROUNDS:
            measured = Measured(compare_format(base, base.format_of(bits), reference), {})
        else:
            measured = measure_mix(base, bits, reference, observer)
        steps.append(Step(bits, mix_bytes(sizes, bits), predicted, measured.kl))
        if target is not None and measured.kl <= target:
            break
    eight = compare_format(base, base.format_of({}, 8), reference)
    sixteen = compare_format(base, base.format_of({}, 16), reference)
    return Found(tuple(steps), alone, eight.mean_kl, sixteen.loss)


def _upgrades(
    sizes: Sequence[LinearSize],
    bits: dict[str, int],
    alone: Divergences,
    measured: Measured,
    num_bytes: int,
    target: float | None,
) -> list[Upgrade]:
    """Return the upgrades of one round. num_bytes: that it may add."""
    found = upgrades(sizes, bits, alone, measured.changes)
    if target is None:
        return list(taken(found, num_bytes))
    if not found:
        # The errors that are left compensate each other. Without any of them the KL is 0.
        independent = {
            path: dict.fromkeys(changes, -2 * alone[path][bits[path]])
            for path, changes in measured.changes.items()
        }
        found = upgrades(sizes, bits, alone, independent)
    # Those that gain much less per byte may not be needed after the next measurement.
    found = [u for u in found if u.rate >= _LEAST_RATE * found[0].rate]
    return list(taken(found, num_bytes, measured.kl - target))
