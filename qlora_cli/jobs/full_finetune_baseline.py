"""`qlora report --measure-before`: full fine-tuning measured on a run's own data.

The steps at which the run's memory peaks are gone with every weight trained, in a process of their
own (`python -m qlora_cli.jobs.full_finetune_baseline RUN ANSWER`): it begins with nothing in memory, and whatever
becomes of it, the run's files are as they were.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.packing import peak_steps
from qlora_cli.errors import DoesNotFit, InputError, QloraError, UsageError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.atomic import report_write_errors, write_json
from qlora_cli.jobs import report, train
from qlora_cli.jobs.prepare import prepare, read_job
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import available_bytes
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import STEP_PHASES, Device, Ledger, Phase
from qlora_cli.memory.tracker import track_gradients
from qlora_cli.plan.dry_run import method_peak
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.runs.run import Run
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.step import train_step
from qlora_cli.units import format_bytes

_NOT_MEASURED = "Full fine-tuning was not measured: "


def measure(run: Path, *, observer: Observer) -> None:
    """Puts the measured side into the run's memory.json, and the planned peak beside it.

    Where full fine-tuning does not fit, its side stays as it was and a note says why. Raises
    UsageError where the run has no ledger or is full fine-tuning itself, QloraError where the
    steps fail for another reason.
    """
    source = Run(run)
    ledger = report.ledger_of(source)
    if ledger.after.method == "full":
        raise UsageError(f"{run} is full fine-tuning itself; there is nothing to compare it with")
    observer.note("measuring steps of full fine-tuning in a fresh process")
    answer = _in_fresh_process(run)
    if "failed" in answer:
        kind = UsageError if answer["exit_code"] == InputError.exit_code else QloraError
        raise kind(answer["failed"])
    notes = tuple(note for note in ledger.notes if not note.startswith(_NOT_MEASURED))
    if "does_not_fit" in answer:
        told = f"{_NOT_MEASURED}{answer['does_not_fit']}."
        observer.note(told)
        ledger = replace(ledger, notes=(*notes, told))
    else:
        phases = tuple(Phase(**phase) for phase in answer["phases"])
        measured = method_peak(full_fine_tuning(source.recipe), phases, "measured")
        planned = _planned_bytes(ledger)
        ledger = replace(ledger, before=measured, before_planned_bytes=planned, notes=notes)
    with report_write_errors("the memory report", source.folder.memory_json):
        write_json(source.folder.memory_json, ledger.to_dict())


def _planned_bytes(ledger: Ledger) -> int:
    return ledger.before_planned_bytes or ledger.before.peak_bytes


def _in_fresh_process(run: Path) -> dict[str, Any]:
    """`phases`, or `does_not_fit` with the reason, or `failed` with it and an `exit_code`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answer.json")
        command = [sys.executable, "-m", __name__, str(run), str(file)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if file.is_file():
            answer: dict[str, Any] = json.loads(file.read_text())
            return answer
    if done.returncode < 0:
        killed = f"its process was ended by signal {-done.returncode}, as the system does when "
        return {"does_not_fit": f"{killed}memory runs out"}
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return {"failed": f"full fine-tuning could not be measured: {last}", "exit_code": 1}


def main(run: Path, answer: Path) -> None:
    """In the fresh process: measures and writes the answer; foreign errors end it."""
    try:
        content: dict[str, Any] = {"phases": [asdict(phase) for phase in _phases(run)]}
    except (DoesNotFit, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and not _out_of_memory(fault):
            raise
        content = {"does_not_fit": str(fault).splitlines()[0]}
    except QloraError as fault:
        content = {"failed": str(fault), "exit_code": fault.exit_code}
    write_json(answer, content)


def _out_of_memory(fault: RuntimeError) -> bool:
    """torch has a class for a full card, and only words for a full host."""
    return isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in str(fault)


def _phases(run: Path) -> tuple[Phase, ...]:
    """Loads, and goes the run's own steps at which memory peaks.

    Raises DoesNotFit before anything is loaded where the plan needs more than is free.
    """
    source = Run(run)
    ledger, facts = report.ledger_of(source), inspect_device()
    if ledger.device != Device(facts.kind, facts.name, facts.capacity_bytes):
        raise UsageError(f"the run was made on {ledger.device.name}, and this is {facts.name}")
    recipe = full_fine_tuning(source.recipe)
    job = read_job(prepare(recipe, facts))
    device = setup_device(facts, recipe.train.seed)
    free = available_bytes(device)
    if _planned_bytes(ledger) > free:
        raise DoesNotFit(
            f"it needs {format_bytes(_planned_bytes(ledger))} as planned, and {format_bytes(free)} "
            f"of {facts.name} are free"
        )
    instrument = Instrument(device, facts)
    state = train.load(job.prepared, device, instrument, Silent())
    steps = sorted(peak_steps(job.schedule, range(job.steps)))
    first, later = STEP_PHASES
    with track_gradients(state.trainable.values(), instrument.tracker):
        # Adam's states are there in later steps only, so the first one is gone once more.
        for name, step in ((first, steps[0]), *((later, step) for step in steps)):
            with instrument.phase(name):
                train_step(state, job.schedule.step_batches(step), recipe.train.lr)
    return instrument.phases


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
