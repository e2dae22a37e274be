"""`qlora verify`: is the merged model the one that was trained?"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_cli.events import Observer
from qlora_cli.export.verify.verification import verify
from qlora_cli.jobs.results import VerifyResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import give_back_freed
from qlora_cli.runs.run import Run


def run(merged: Path, *, against: Path, observer: Observer) -> VerifyResult:
    """Compares a merged folder with its run; figures are NaN where it could not be asked.

    Raises InputError where one of the two is not there or not finished.
    """
    give_back_freed()
    device = torch.device(inspect_device().kind)
    verdict = verify(merged, Run(against), device, observer)
    told, greedy = verdict.comparison, verdict.greedy
    return VerifyResult(
        passed=verdict.passed,
        max_logit_difference=told.max_logit_difference if told else math.nan,
        mean_kl=told.mean_kl if told else math.nan,
        top1_agreement=told.top1_agreement if told else math.nan,
        faults=verdict.faults,
        greedy_agreement=greedy.agree if greedy else None,
        greedy_tokens=greedy.num_tokens if greedy else None,
    )
