"""The ledger: how a job's memory is distributed over categories, as pure data.

`Ledger.to_dict` is the content of `memory.json` and part of `qlora plan --json`. The categories of
a phase (`at_peak`) always add up to its `peak_bytes`. A `Phase` whose categories do not add up
raises AssertionError when it is created, because a table with missing bytes would mislead the
reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

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
"""base: frozen weights of the blocks. quant_constants: scales and codes of packed weights.
embeddings, head: token tables. adapter: A and B of LoRA, or all trained weights of full
fine-tuning. activations: tensors that the backward pass needs. loss: logits of one chunk and the
tensors computed from them. temporary: memory that one operation needs while it runs. other: bytes
that the device's counter reports and the tracker does not attribute to a category."""

STEP_PHASES = ("first_step", "step")
PHASE_ORDER = ("load", *STEP_PHASES, "checkpoint", "eval", "merge")
"""All phases in the order in which they are shown."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of bytes or steps. The limits apply to what is read from a file."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FigureSource = Literal["measured", "planned"]


@dataclass(frozen=True)
class Phase:
    """The peak of one part of the job, in bytes.

    name: load, first_step, step, checkpoint, eval or merge. live_bytes: what lives when the phase
    ends. at_peak: category -> bytes at the moment of the peak; adds up to `peak_bytes`.
    """

    name: str
    peak_bytes: Count
    live_bytes: Count
    at_peak: dict[str, Count]

    def __post_init__(self) -> None:
        _check_sum(self.name, self.peak_bytes, self.at_peak)

    def at_least(self, device_peak_bytes: int) -> Phase:
        """Return the phase with a peak of at least `device_peak_bytes`.

        device_peak_bytes: the peak that the device's own counter reports. Bytes beyond the tracked
        ones are added to the category `other`.
        """
        untracked = device_peak_bytes - self.peak_bytes
        if untracked <= 0:
            return self
        at_peak = self.at_peak | {"other": self.at_peak.get("other", 0) + untracked}
        return replace(self, peak_bytes=device_peak_bytes, at_peak=at_peak)


@dataclass(frozen=True)
class MethodPeak:
    """The peak of a complete job with one method: the baseline (full fine-tuning) or this job.

    method: the adapter method. bits: bits of the frozen weights; None if they are mixed.
    """

    method: str
    source: FigureSource
    peak_bytes: Count
    at_peak: dict[str, Count]
    bits: Count | None = None

    def __post_init__(self) -> None:
        _check_sum(self.method, self.peak_bytes, self.at_peak)


@dataclass(frozen=True)
class Device:
    """The device of a ledger. kind: "cpu" or "cuda"."""

    kind: str
    name: str
    capacity_bytes: Count


@dataclass(frozen=True)
class Allocator:
    """Peaks of the device's own counters, in bytes; zero if the device has no such counter.

    allocated, reserved: counters of torch's caching allocator. driver: all memory that the driver
    reports as used, including the CUDA context and libraries.
    """

    allocated: Count = 0
    reserved: Count = 0
    driver: Count = 0

    def larger_of_each(self, other: Allocator) -> Allocator:
        """Return the higher value of each counter."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Allocator(*(max(pair) for pair in pairs))


@dataclass(frozen=True)
class ProcessMemory:
    """What one of the processes that train a job together has measured, each on its device."""

    rank: Count
    phases: tuple[Phase, ...]
    allocator: Allocator


@dataclass(frozen=True)
class InstrumentCost:
    """The cost of measuring memory.

    steps: optimizer steps of this process. tracked_steps: steps with the tracker on.
    tracked_seconds: mean duration of the tracked steps, without the process's first step, which is
    slower anyway. plain_seconds: duration of a step with as many tokens and without the tracker.
    Either is 0 if there was no such step. record_bytes: host memory of the instrument's own records
    after the last tracked step.
    """

    steps: Count
    tracked_steps: Count
    tracked_seconds: Seconds
    plain_seconds: Seconds
    record_bytes: Count


@dataclass(frozen=True)
class Ledger:
    """The content of `memory.json`. Files of older versions lack the fields with a default."""

    device: Device
    phases: tuple[Phase, ...]
    before: MethodPeak
    after: MethodPeak
    planned_peak_bytes: Count
    measured_peak_bytes: Count
    allocator: Allocator = field(default_factory=Allocator)
    instrument: str = ""
    """The source of the figures, in words: the tracker, the allocator or the plan."""
    before_planned_bytes: Count = 0
    """Planned peak of full fine-tuning if `before` was measured; 0 if `before` is the plan."""
    floor_bytes: Count = 0
    """Lower bound of the job's memory: packed weights, adapter state, one block's working set and
    the inputs of all blocks; 0 if unknown."""
    instrument_cost: InstrumentCost | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the reader about how the figures were obtained."""
    processes: tuple[ProcessMemory, ...] = ()
    """The measurements of each process of the last start, if there are several; `phases` and
    `allocator` are the highest of all."""

    @property
    def ratio(self) -> float:
        """Peak of full fine-tuning divided by the peak of this job; 0 if nothing was measured."""
        return self.before.peak_bytes / self.after.peak_bytes if self.after.peak_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `memory.json`.

        `bits` is left out if it is None, and `processes` if there is one process.
        """
        content = asdict(self)
        content["phases"], content["notes"] = list(content["phases"]), list(self.notes)
        processes = content.pop("processes")
        if processes:
            content["processes"] = [p | {"phases": list(p["phases"])} for p in processes]
        for key in ("before", "after"):
            if content[key]["bits"] is None:
                del content[key]["bits"]
        content["ratio"] = self.ratio
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Ledger:
        """Return the ledger of the content of `memory.json`.

        Raises ValueError or AssertionError if the content is damaged.
        """
        return _LEDGER.validate_python(content)


_LEDGER = TypeAdapter(Ledger)


def peak_phase(phases: tuple[Phase, ...]) -> Phase:
    """Return the phase with the highest peak."""
    return max(phases, key=lambda phase: phase.peak_bytes)


def last_step(phases: Iterable[Phase]) -> Phase:
    """Return the phase of the steps after the first one; of the first step if it is the only one.

    phases: of a job with at least one step.
    """
    return max(
        (phase for phase in phases if phase.name in STEP_PHASES),
        key=lambda phase: STEP_PHASES.index(phase.name),
    )


def larger_of_each(earlier: tuple[Phase, ...], later: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Merge the phases of two processes of one job.

    A phase that both processes measured has the higher of the two peaks.
    """
    phases = {phase.name: phase for phase in earlier}
    for phase in later:
        phases[phase.name] = peak_phase((phase, phases.get(phase.name, phase)))
    return tuple(phases.values())


def _check_sum(name: str, peak_bytes: int, at_peak: dict[str, int]) -> None:
    unknown = set(at_peak) - set(CATEGORIES)
    assert not unknown, f"{name}: unknown categories {sorted(unknown)}"
    total = sum(at_peak.values())
    assert total == peak_bytes, f"{name}: categories add up to {total}, the peak is {peak_bytes}"
