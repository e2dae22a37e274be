"""What a training job leaves about its memory: memory.json and timeline.json.

Both are written at each checkpoint and at the end, so that a run that was stopped can be reported,
and a process that resumes it takes over what the earlier one measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import RESUME_HINT, report_write_errors, write_json
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.jobs.report import read_ledger, read_timeline
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.instrument_cost import record_bytes
from qlora_cli.memory.ledger import (
    STEP_PHASES,
    Device,
    InstrumentCost,
    Ledger,
    MethodPeak,
    Phase,
    larger_of_each,
    peak_phase,
)
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.plan.dry_run import method_peak
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train.loop import Progress


@dataclass(frozen=True)
class Earlier:
    """What another process measured of the same run. step: after which this process goes on."""

    step: int
    ledger: Ledger | None = None
    traces: tuple[PhaseTrace, ...] = ()
    damage: str | None = None

    @classmethod
    def of(cls, run: RunFolder, step: int) -> Earlier:
        """A damaged file is left out, and said to be: a report is no reason not to train."""
        try:
            return cls(step, read_ledger(run), read_timeline(run))
        except UsageError as fault:
            return cls(step, damage=str(fault).splitlines()[0])


@dataclass(frozen=True)
class MemoryRecord:
    """One process's view of a job's memory. earlier: None in a run's first process."""

    job: TrainingJob
    planned: MemoryPlan
    before: MemoryPlan
    instrument: Instrument
    earlier: Earlier | None

    def write(self, progress: Progress) -> Ledger:
        """Writes both files, each whole. Raises QloraError where the disk refuses."""
        run, ledger = self.job.run, self._ledger(progress)
        known = self.earlier.traces if self.earlier else ()
        traces = [s.to_dict() for s in (*known, *self.instrument.timeline.traces)]
        with report_write_errors("the memory report", run.memory_json, hint=RESUME_HINT):
            write_json(run.timeline_json, {"stretches": traces})
            write_json(run.memory_json, ledger.to_dict())
        return ledger

    def _ledger(self, progress: Progress) -> Ledger:
        recipe, facts = self.job.prepared.recipe, self.job.prepared.profile
        device = Device(facts.kind, facts.name, facts.capacity_bytes)
        known = self._known(device)
        phases = self.instrument.phases
        if known is not None:
            phases = larger_of_each(known.phases, phases)
        stepped = _has_step(phases)
        before, before_planned_bytes = self._before(known)
        allocator = self.instrument.allocator()
        return Ledger(
            device=device,
            phases=phases,
            before=before,
            after=method_peak(recipe, phases, "measured")
            if stepped
            else method_peak(recipe, self.planned.phases, "planned"),
            planned_peak_bytes=self.planned.peak_bytes,
            measured_peak_bytes=peak_phase(phases).peak_bytes if stepped else 0,
            allocator=allocator if known is None else allocator.larger_of_each(known.allocator),
            instrument=self.instrument.describe(),
            before_planned_bytes=before_planned_bytes,
            floor_bytes=self.planned.floor_bytes,
            instrument_cost=_cost(progress, self.instrument),
            notes=tuple(self._notes(known, stepped)),
        )

    def _known(self, device: Device) -> Ledger | None:
        """What an earlier process measured, if on the same device."""
        ledger = self.earlier.ledger if self.earlier else None
        return ledger if ledger is not None and ledger.device == device else None

    def _before(self, known: Ledger | None) -> tuple[MethodPeak, int]:
        """(full fine-tuning, its planned peak where it was measured in the meantime)."""
        if known is not None and known.before.source == "measured":
            return known.before, self.before.peak_bytes
        return method_peak(
            full_fine_tuning(self.job.prepared.recipe), self.before.phases, "planned"
        ), 0

    def _notes(self, known: Ledger | None, stepped: bool) -> list[str]:
        notes = []
        if self.earlier is not None:
            taken = (
                "phases show the worse of this process and of those before it"
                if known is not None
                else "what earlier processes measured is not known"
            )
            notes.append(f"The run was resumed after step {self.earlier.step}; {taken}.")
            if self.earlier.damage:
                notes.append(f"Left out: {self.earlier.damage}.")
        if not stepped:
            notes.append("No training step was measured; `after` is the plan.")
        return notes


def _has_step(phases: tuple[Phase, ...]) -> bool:
    return any(phase.name in STEP_PHASES for phase in phases)


def _cost(progress: Progress, instrument: Instrument) -> InstrumentCost:
    tracked, plain = progress.tracked, progress.plain
    tokens = tracked.tokens / tracked.steps if tracked.steps else 0.0
    return InstrumentCost(
        steps=progress.steps,
        tracked_steps=tracked.steps + progress.first.steps,
        tracked_seconds=tracked.seconds / tracked.steps if tracked.steps else 0.0,
        plain_seconds=plain.seconds / plain.tokens * tokens if plain.tokens else 0.0,
        record_bytes=record_bytes(instrument),
    )
