"""The ledger: where the bytes are, as pure data. See "The ledger" in the design for the contract.

A phase's `at_peak` adds up to its `peak_bytes`; making a phase that does not add up is an error of
the program and raises at once, because a table whose rows miss bytes is worse than no table.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Literal

CATEGORIES = (
    "base",
    "quant_constants",
    "embeddings",
    "head",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "temporary",
    "other",
)
"""base: frozen weights of the blocks; quant_constants: scales and codes of packed weights;
embeddings, head: token tables; adapter: A and B, or every trained weight of full fine-tuning;
activations: what backward needs; loss: logits of one chunk and what they become; temporary: what
one operation needs while it runs; other: seen by the device's counter and attributed to
nothing."""

PHASES = ("load", "first_step", "step", "checkpoint", "eval", "merge")
STEP_PHASES = ("first_step", "step")

FigureSource = Literal["measured", "planned"]


@dataclass(frozen=True)
class Phase:
    """The worst instant of one part of the job. All figures in bytes."""

    name: str
    peak_bytes: int
    live_bytes: int
    at_peak: dict[str, int]

    def __post_init__(self) -> None:
        _check_sum(self.name, self.peak_bytes, self.at_peak)

    def at_least(self, seen_bytes: int) -> Phase:
        """With a device's own count of the peak; what it saw beyond the categories is `other`."""
        unseen = seen_bytes - self.peak_bytes
        if unseen <= 0:
            return self
        at_peak = self.at_peak | {"other": self.at_peak.get("other", 0) + unseen}
        return replace(self, peak_bytes=seen_bytes, at_peak=at_peak)


@dataclass(frozen=True)
class MethodPeak:
    """One side of before and after: a method's worst instant over the whole job."""

    method: str
    source: FigureSource
    peak_bytes: int
    at_peak: dict[str, int]
    bits: int | None = None

    def __post_init__(self) -> None:
        _check_sum(self.method, self.peak_bytes, self.at_peak)


@dataclass(frozen=True)
class Device:
    """kind: cpu | cuda."""

    kind: str
    name: str
    capacity_bytes: int


@dataclass(frozen=True)
class Allocator:
    """The device's own peaks, in bytes; zero where the device keeps no such counter.

    allocated and reserved: torch's caching allocator. driver: all that the driver counts as used,
    context and libraries included.
    """

    allocated: int = 0
    reserved: int = 0
    driver: int = 0

    def larger_of_each(self, other: Allocator) -> Allocator:
        """Each counter's higher value of the two."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Allocator(*(max(pair) for pair in pairs))


@dataclass(frozen=True)
class InstrumentCost:
    """What measuring cost the job it measured.

    steps: optimizer steps of this process; tracked_steps: those with the instrument on.
    tracked_seconds: mean of the tracked ones after the process's first, which is slower anyway;
    plain_seconds: what as many tokens take without the instrument; either is 0 where there was no
    such step. record_bytes: on the host, of the instrument's own records after the last of them.
    """

    steps: int
    tracked_steps: int
    tracked_seconds: float
    plain_seconds: float
    record_bytes: int


@dataclass(frozen=True)
class Ledger:
    """What `memory.json` holds. Fields with a default are absent from older files."""

    device: Device
    phases: tuple[Phase, ...]
    before: MethodPeak
    after: MethodPeak
    planned_peak_bytes: int
    measured_peak_bytes: int
    allocator: Allocator = field(default_factory=Allocator)
    instrument: str = ""
    """What the figures were read from, in words: the tracker, the allocator, or the plan."""
    before_planned_bytes: int = 0
    """Full fine-tuning's planned peak, kept beside a measured one; 0 where `before` is the plan."""
    floor_bytes: int = 0
    """What the job cannot do without: packed weights, adapter state, one block's working set and
    the blocks' inputs; 0 where it is not known."""
    instrument_cost: InstrumentCost | None = None
    notes: tuple[str, ...] = ()
    """What a reader of these figures has to know of how they came about, one sentence each."""

    @property
    def ratio(self) -> float:
        """How many times less memory the job needs than full fine-tuning."""
        return self.before.peak_bytes / self.after.peak_bytes if self.after.peak_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object of the contract; an absent `bits` is left out."""
        content = asdict(self)
        content["phases"], content["notes"] = list(content["phases"]), list(self.notes)
        for method_peak in ("before", "after"):
            if content[method_peak]["bits"] is None:
                del content[method_peak]["bits"]
        content["ratio"] = self.ratio
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Ledger:
        """The inverse of `to_dict`; raises KeyError or AssertionError on a damaged one."""
        cost = content.get("instrument_cost")
        return cls(
            device=Device(**content["device"]),
            phases=tuple(Phase(**phase) for phase in content["phases"]),
            before=MethodPeak(**content["before"]),
            after=MethodPeak(**content["after"]),
            planned_peak_bytes=content["planned_peak_bytes"],
            measured_peak_bytes=content["measured_peak_bytes"],
            allocator=Allocator(**content["allocator"]),
            instrument=content["instrument"],
            before_planned_bytes=content.get("before_planned_bytes", 0),
            floor_bytes=content.get("floor_bytes", 0),
            instrument_cost=None if cost is None else InstrumentCost(**cost),
            notes=tuple(content.get("notes", ())),
        )


def worst(phases: tuple[Phase, ...]) -> Phase:
    """The phase with the highest peak."""
    return max(phases, key=lambda phase: phase.peak_bytes)


def larger_of_each(earlier: tuple[Phase, ...], now: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The phases of two processes of one job; one that both went through is its worse time."""
    phases = {phase.name: phase for phase in earlier}
    for phase in now:
        phases[phase.name] = worst((phase, phases.get(phase.name, phase)))
    return tuple(phases.values())


def _check_sum(name: str, peak_bytes: int, at_peak: dict[str, int]) -> None:
    unknown = set(at_peak) - set(CATEGORIES)
    assert not unknown, f"{name}: unknown categories {sorted(unknown)}"
    total = sum(at_peak.values())
    assert total == peak_bytes, f"{name}: categories add up to {total}, the peak is {peak_bytes}"
