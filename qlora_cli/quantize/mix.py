"""Chooses which linears get more bits, by estimated KL per additional byte. No torch.

A mix maps the path of each linear to its bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Mix = Mapping[str, int]
Estimates = Mapping[str, Mapping[int, float]]
"""Path of a linear -> bits -> nats per predicted token."""


@dataclass(frozen=True)
class LinearSize:
    """A linear of the base. num_bytes: bits -> bytes of the packed weight and its scales."""

    path: str
    num_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Upgrade:
    """More bits for one linear. gain: estimated decrease of the KL. num_bytes: additional."""

    path: str
    bits: int
    gain: float
    num_bytes: int

    @property
    def rate(self) -> float:
        """Return the gain per byte."""
        return self.gain / self.num_bytes


def mix_bytes(sizes: Sequence[LinearSize], mix: Mix) -> int:
    """Return the bytes of all linears in a mix."""
    return sum(size.num_bytes[mix[size.path]] for size in sizes)


def upgrades(
    sizes: Sequence[LinearSize], mix: Mix, alone: Estimates, changes: Estimates
) -> list[Upgrade]:
    """Return every upgrade of one linear that decreases the KL, the most per byte first.

    alone: KL if one linear alone is quantized. changes: change of the mix's KL if one linear gets
    more bits, to first order. The second order is what both formats cost alone, because rounding
    errors of two formats of a weight are hardly correlated. It takes back half of the first order
    at most, which is where the KL is lowest between both formats.
    """
    found = []
    for size in sizes:
        own = mix[size.path]
        for bits, change in changes.get(size.path, {}).items():
            costs = sum(alone[size.path].get(b, 0.0) for b in (own, bits))
            gain = -change - min(costs, -change / 2)
            if gain > 0:
                added = size.num_bytes[bits] - size.num_bytes[own]
                found.append(Upgrade(size.path, bits, gain, added))
    return sorted(found, key=lambda upgrade: -upgrade.rate)


def taken(found: Sequence[Upgrade], budget: int, gain: float = float("inf")) -> Iterator[Upgrade]:
    """Yield the upgrades that are taken, one per linear, while they fit.

    budget: additional bytes. gain: no further upgrade is taken when their gains reach it.
    """
    done: set[str] = set()
    for upgrade in found:
        if gain <= 0:
            return
        if upgrade.path not in done and upgrade.num_bytes <= budget:
            done.add(upgrade.path)
            budget -= upgrade.num_bytes
            gain -= upgrade.gain
            yield upgrade


def overrides_of(mix: Mix, default: int = 4) -> dict[str, int]:
    """Return `base.overrides` of a mix: linears with the same bits in all blocks as one pattern."""
    groups: dict[str, list[str]] = {}
    for path in mix:
        tail = re.split(r"\.\d+\.", path)[-1]
        groups.setdefault(f"*.{tail}", []).append(path)
    found: dict[str, int] = {}
    for pattern, paths in groups.items():
        bits = {mix[path] for path in paths}
        if len(bits) == 1 and len(paths) > 1:
            found[pattern] = bits.pop()
        else:
            found |= {path: mix[path] for path in paths}
    return {name: bits for name, bits in found.items() if bits != default}
