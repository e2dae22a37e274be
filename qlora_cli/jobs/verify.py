"""`qlora verify`: check that a merged model computes what was trained."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_cli.events import Observer
from qlora_cli.export.merge.manifest import merged_step
from qlora_cli.export.verify.record import write_record
from qlora_cli.export.verify.verification import verify
from qlora_cli.jobs.results import VerifyResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.runs.run import Run


def run(merged: Path, *, against: Path, observer: Observer) -> VerifyResult:
    """Compare a merged model with its run.

    merged: folder of the merged model. against: the run's folder, or one of its checkpoints; by
    default the weights of the step that was merged are used. The figures of the result are NaN if
    the two models could not be compared. The result is also written to `verification.json` in the
    merged folder. Raises InputError if one of the folders is missing or incomplete.
    """
    return_freed_memory()
    device = torch.device(inspect_device().kind)
    verification = verify(merged, _run_of(merged, against), device, observer)
    comparison, greedy = verification.comparison, verification.greedy
    result = VerifyResult(
        passed=verification.passed,
        max_logit_difference=comparison.max_logit_difference if comparison else math.nan,
        mean_kl=comparison.mean_kl if comparison else math.nan,
        top1_agreement=comparison.top1_agreement if comparison else math.nan,
        faults=verification.faults,
        greedy_agreement=greedy.num_agreeing if greedy else None,
        greedy_tokens=greedy.num_tokens if greedy else None,
        explanation=verification.explanation,
    )
    write_record(merged, {**result.to_dict(), "run": str(against.resolve())}, observer)
    return result


def _run_of(merged: Path, against: Path) -> Run:
    """Return the run with the weights of the step that merge.json records, if it records one.

    A step that is part of the path `against` takes precedence.
    """
    run = Run(against)
    return run if run.step is not None else Run(against, merged_step(merged))
