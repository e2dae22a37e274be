"""`qlora report --measure-before`: measures full fine-tuning on a run's own data.

The run's steps with the highest memory are trained again with full fine-tuning. This happens in a
new process (`python -m qlora_cli.jobs.full_finetune_baseline RUN RESULT_FILE`), which starts with
empty memory and does not change the run's files, whether it succeeds or fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

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
from qlora_cli.shortage import converted
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.step import train_step
from qlora_cli.units import format_bytes

_NOT_MEASURED = "Full fine-tuning was not measured: "


def measure(run: Path, *, observer: Observer) -> None:
    """Measure full fine-tuning and write the result into the run's memory.json.

    The planned peak is kept next to the measured one. If full fine-tuning does not fit, its planned
    peak stays and a note with the reason is added. Raises UsageError if the run has no ledger or is
    full fine-tuning itself, and QloraError if the steps fail for another reason.
    """
    source = Run(run)
    ledger = report.ledger_of(source)
    if ledger.after.method == "full":
        raise UsageError(f"{run} is full fine-tuning itself; there is nothing to compare it with")
    observer.note("measuring steps of full fine-tuning in a new process")
    result = _run_in_new_process(run)
    if "failed" in result:
        error_class = UsageError if result["exit_code"] == InputError.exit_code else QloraError
        raise error_class(result["failed"])
    notes = tuple(note for note in ledger.notes if not note.startswith(_NOT_MEASURED))
    if "does_not_fit" in result:
        note = f"{_NOT_MEASURED}{result['does_not_fit']}."
        observer.note(note)
        ledger = replace(ledger, notes=(*notes, note))
    else:
        phases = tuple(Phase(**phase) for phase in result["phases"])
        measured = method_peak(full_fine_tuning(source.recipe), phases, "measured")
        planned = _planned_bytes(ledger)
        ledger = replace(ledger, before=measured, before_planned_bytes=planned, notes=notes)
    with report_write_errors("the memory report", source.folder.memory_json):
        write_json(source.folder.memory_json, ledger.to_dict())


def _planned_bytes(ledger: Ledger) -> int:
    return ledger.before_planned_bytes or ledger.before.peak_bytes


def _run_in_new_process(run: Path) -> dict[str, Any]:
    """Measure in a new process and return its result.

    The result has the key `phases`, or `does_not_fit` with the reason, or `failed` with the reason
    and `exit_code`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, "-m", __name__, str(run), str(file)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if file.is_file():
            result: dict[str, Any] = json.loads(file.read_text())
            return result
    if done.returncode < 0:
        reason = f"its process was ended by signal {-done.returncode}, probably for lack of memory"
        return {"does_not_fit": reason}
    last_line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return {"failed": f"full fine-tuning could not be measured: {last_line}", "exit_code": 1}


def main(run: Path, result_file: Path) -> None:
    """Measure and write the result file; the entry point of the new process.

    Errors other than QloraError and out of memory end the process.
    """
    try:
        content: dict[str, Any] = {"phases": [asdict(phase) for phase in _measure_phases(run)]}
    except (DoesNotFit, RuntimeError) as error:
        if not isinstance(converted(error), DoesNotFit):
            raise
        content = {"does_not_fit": str(error).splitlines()[0]}
    except QloraError as error:
        content = {"failed": str(error), "exit_code": error.exit_code}
    write_json(result_file, content)


def _measure_phases(run: Path) -> tuple[Phase, ...]:
    """Load the model, train the run's steps with the highest memory and return the phases.

    Raises DoesNotFit, before anything is loaded, if the plan needs more than the free memory.
    """
    source = Run(run)
    ledger, profile = report.ledger_of(source), inspect_device()
    if ledger.device != Device(profile.kind, profile.name, profile.capacity_bytes):
        raise UsageError(
            f"the run was trained on {ledger.device.name}, but this machine has {profile.name}"
        )
    recipe = full_fine_tuning(source.recipe)
    job = read_job(prepare(recipe, profile))
    device = setup_device(profile, recipe.train.seed)
    free = available_bytes(device)
    if _planned_bytes(ledger) > free:
        raise DoesNotFit(
            f"the plan needs {format_bytes(_planned_bytes(ledger))}, and {profile.name} has "
            f"{format_bytes(free)} free"
        )
    instrument = Instrument(device, profile)
    state = train.load(job.prepared, device, instrument, Silent())
    if state.task.needs_constants:
        # Their values do not change the memory.
        width = len(state.task.segment_names)
        job.schedule.set_constants(np.zeros((job.schedule.num_rows, width), np.float32))
    steps = sorted(peak_steps(job.schedule, range(job.steps)))
    first, later = STEP_PHASES
    with track_gradients(state.trainable.values(), instrument.tracker):
        # Adam's states exist only in later steps, so the first measured step is repeated as one.
        for name, step in ((first, steps[0]), *((later, step) for step in steps)):
            with instrument.phase(name):
                train_step(state, job.schedule.step_batches(step), recipe.train.lr)
    return instrument.phases


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
