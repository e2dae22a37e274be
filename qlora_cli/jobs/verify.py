"""`qlora verify`: check that a merged model computes what the trained model computes."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_cli.events import Observer
from qlora_cli.export.verify.verification import verify
from qlora_cli.jobs.results import VerifyResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.runs.run import Run


def run(merged: Path, *, against: Path, observer: Observer) -> VerifyResult:
    """Compare a merged model with its run.

    merged: folder of the merged model. against: the run's folder. The figures of the result are NaN
    if the two models could not be compared. Raises InputError if one of the folders is missing or
    incomplete.
    """
    return_freed_memory()
    device = torch.device(inspect_device().kind)
    verification = verify(merged, Run(against), device, observer)
    comparison, greedy = verification.comparison, verification.greedy
    return VerifyResult(
        passed=verification.passed,
        max_logit_difference=comparison.max_logit_difference if comparison else math.nan,
        mean_kl=comparison.mean_kl if comparison else math.nan,
        top1_agreement=comparison.top1_agreement if comparison else math.nan,
        faults=verification.faults,
        greedy_agreement=greedy.num_agreeing if greedy else None,
        greedy_tokens=greedy.num_tokens if greedy else None,
    )
