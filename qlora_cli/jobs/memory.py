"""Writes a training job's memory files, memory.json and timeline.json.

Both are written at each checkpoint and at the end. So a stopped run can be reported, and a process
that resumes the run continues with the measurements of the earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import RESUME_HINT, report_write_errors, write_json
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.jobs.report import read_ledger, read_timeline
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.instrument_cost import record_bytes
from qlora_cli.memory.ledger import (
    PHASE_ORDER,
    STEP_PHASES,
    Allocator,
    Device,
    InstrumentCost,
    Ledger,
    MethodPeak,
    Phase,
    ProcessMemory,
    larger_of_each,
    peak_phase,
)
from qlora_cli.memory.timeline import PhaseTrace, timeline_content
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.plan.dry_run import DryRun, method_peak
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train.progress import Progress
from qlora_cli.train.shortage import Shortage, recorded_shortages
from qlora_cli.units import format_bytes


@dataclass(frozen=True)
class EarlierProcess:
    """The measurements of an earlier process of the same run.

    step: the optimizer step after which this process resumes. damage: the error if the earlier
    files are damaged; then `ledger` and `traces` are empty.
    """

    step: int
    ledger: Ledger | None = None
    traces: tuple[PhaseTrace, ...] = ()
    damage: str | None = None

    @classmethod
    def of(cls, run: RunFolder, step: int) -> EarlierProcess:
        """Read the earlier measurements of a run.

        A damaged file does not stop training; it is left out and reported in the ledger's notes.
        """
        try:
            return cls(step, read_ledger(run), read_timeline(run))
        except UsageError as error:
            return cls(step, damage=str(error).splitlines()[0])


def gather_memory(processes: Processes, instrument: Instrument) -> list[ProcessMemory]:
    """Return what every process of a job has measured. Each of them calls this together."""
    own = ProcessMemory(processes.rank, instrument.phases, instrument.allocator())
    return processes.gather(own)


@dataclass(frozen=True)
class MemoryRecord:
    """The memory measurements of a job since its last start, by the main process.

    plan: the plan of this job at its start. baseline_plan: the plan of full fine-tuning on the same
    batches. earlier: the measurements of an earlier start; None at the first start of a run.
    processes: those that train the job.
    """

    job: TrainingJob
    plan: MemoryPlan
    baseline_plan: MemoryPlan
    instrument: Instrument
    earlier: EarlierProcess | None
    processes: Processes = SINGLE
    _plans: dict[tuple[int, int], MemoryPlan] = field(default_factory=dict)

    def current_plan(self) -> MemoryPlan:
        """Return the plan with what has applied since memory ran short, else the job's plan."""
        shortage = self._shortage()
        if shortage is None:
            return self.plan
        settings = (shortage.recomputed_blocks, shortage.parts)
        if settings not in self._plans:
            job, prepared = self.job, self.job.prepared
            batches = (job.largest_divided_batches(shortage.parts), job.largest_eval_batches)
            given = (prepared.recipe, prepared.config, prepared.profile, *batches)
            dry = DryRun(*given, has_copy=prepared.has_packed_copy(prepared.recipe))
            self._plans[settings] = dry.plan(shortage.recomputed_blocks)
        return self._plans[settings]

    def _shortage(self) -> Shortage | None:
        """Return the last lack of memory of the run, which decides its settings since then."""
        shortages = recorded_shortages(self.job.run.read())
        return shortages[-1] if shortages else None

    def write(self, progress: Progress) -> Ledger:
        """Write both files and return the ledger. Raises QloraError if writing fails.

        The other processes call `gather_memory` at the same time.
        """
        measured = gather_memory(self.processes, self.instrument)
        run, ledger = self.job.run, self._ledger(progress, measured)
        earlier_traces = self.earlier.traces if self.earlier else ()
        timeline = timeline_content([*earlier_traces, *self.instrument.timeline.traces])
        with report_write_errors("the memory report", run.memory_json, hint=RESUME_HINT):
            write_json(run.timeline_json, timeline)
            write_json(run.memory_json, ledger.to_dict())
        return ledger

    def _ledger(self, progress: Progress, measured: Sequence[ProcessMemory]) -> Ledger:
        recipe, profile = self.job.prepared.recipe, self.job.prepared.profile
        plan = self.current_plan()
        device = Device(profile.kind, profile.name, profile.capacity_bytes)
        known = self._earlier_ledger(device)
        phases = reduce(larger_of_each, (process.phases for process in measured))
        if known is not None:
            phases = larger_of_each(known.phases, phases)
        # Evaluations take place between steps and before checkpoints, too.
        phases = tuple(sorted(phases, key=lambda phase: PHASE_ORDER.index(phase.name)))
        has_step = _has_step(phases)
        before, before_planned_bytes = self._baseline(known)
        allocator = reduce(Allocator.larger_of_each, (process.allocator for process in measured))
        return Ledger(
            device=device,
            phases=phases,
            before=before,
            after=method_peak(recipe, phases, "measured")
            if has_step
            else method_peak(recipe, plan.phases, "planned"),
            planned_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=peak_phase(phases).peak_bytes if has_step else 0,
            allocator=allocator if known is None else allocator.larger_of_each(known.allocator),
            instrument=self.instrument.describe(),
            before_planned_bytes=before_planned_bytes,
            floor_bytes=plan.floor_bytes,
            instrument_cost=_cost(progress, self.instrument),
            notes=tuple(self._notes(known, has_step)),
            processes=tuple(measured) if len(measured) > 1 else (),
        )

    def _earlier_ledger(self, device: Device) -> Ledger | None:
        """Return the ledger of an earlier process if it ran on the same device."""
        ledger = self.earlier.ledger if self.earlier else None
        return ledger if ledger is not None and ledger.device == device else None

    def _baseline(self, known: Ledger | None) -> tuple[MethodPeak, int]:
        """Return the peak of full fine-tuning, and its planned peak if the first was measured.

        The second value is 0 if full fine-tuning was not measured.
        """
        if known is not None and known.before.source == "measured":
            return known.before, self.baseline_plan.peak_bytes
        return method_peak(
            full_fine_tuning(self.job.prepared.recipe), self.baseline_plan.phases, "planned"
        ), 0

    def _notes(self, known: Ledger | None, has_step: bool) -> list[str]:
        """Return the ledger's notes. known: the ledger of an earlier process on this device."""
        notes = []
        if self.earlier is not None:
            scope = (
                "each phase shows the highest peak of all processes of the run"
                if known is not None
                else "the measurements of earlier processes are not available"
            )
            notes.append(f"The run was resumed after step {self.earlier.step}; {scope}.")
            if self.earlier.damage:
                notes.append(f"A file of an earlier process was ignored: {self.earlier.damage}.")
        if shortage := self._shortage():
            notes.append(
                f"Memory ran short in step {shortage.step}. The plan is for what applies since "
                f"then: {shortage.recomputed_blocks} recomputed blocks, each micro-batch in "
                f"{shortage.parts} part{'' if shortage.parts == 1 else 's'}. This process began "
                f"with a plan of {format_bytes(self.plan.peak_bytes)}; the measured peak includes "
                "the steps before the change."
            )
        if self.processes.size > 1:
            notes.append(
                f"The job ran in {self.processes.size} processes, one per device; each phase shows "
                "the highest peak of all of them, and `processes` has each one's."
            )
        if not has_step:
            notes.append("No training step was measured; `after` is the plan.")
        return notes


def _has_step(phases: tuple[Phase, ...]) -> bool:
    return any(phase.name in STEP_PHASES for phase in phases)


def _cost(progress: Progress, instrument: Instrument) -> InstrumentCost:
    """Return the cost of measuring; plain steps are scaled to the tokens of a tracked step."""
    tracked, plain = progress.tracked, progress.plain
    tokens = tracked.tokens / tracked.steps if tracked.steps else 0.0
    return InstrumentCost(
        steps=progress.steps,
        tracked_steps=tracked.steps + progress.first.steps,
        tracked_seconds=tracked.seconds / tracked.steps if tracked.steps else 0.0,
        plain_seconds=plain.seconds / plain.tokens * tokens if plain.tokens else 0.0,
        record_bytes=record_bytes(instrument),
    )
