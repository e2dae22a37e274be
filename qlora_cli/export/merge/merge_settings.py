"""Into which base and in which dtype a model is merged, and why.

float16 unless something else is asked for, because everything reads it and it rounds eight times
finer than bfloat16. Where it does not hold the model, bfloat16 is taken instead and said so; where
float16 was insisted on, that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import VerificationFailed
from qlora_cli.events import Observer
from qlora_cli.export.compare.dtype_range import DtypeFit, check_dtype_range
from qlora_cli.export.compare.eval_rows import EvalRows, eval_rows
from qlora_cli.export.merge.base_choice import BaseChoice, choose_base
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.files.locate import read_config
from qlora_cli.runs.run import Run

PREFERRED = torch.float16
INSTEAD = torch.bfloat16


@dataclass(frozen=True)
class MergeSettings:
    """tensors: what to write. fit: into float16, where that was chosen."""

    tensors: MergedTensors
    judgement: BaseChoice
    dtype_reason: str
    fit: DtypeFit | None

    def to_dict(self) -> dict[str, Any]:
        """For merge.json."""
        return {
            "judgement": self.judgement.to_dict(),
            "dtype_reason": self.dtype_reason,
            "float16": self.fit.to_dict() if self.fit is not None else None,
        }


def choose_settings(
    run: Run, tensors: MergedTensors, base: str, insisted: bool, observer: Observer
) -> MergeSettings:
    """base: original | dequantized | auto. insisted: on the dtype of `tensors`, whatever happens.

    Raises VerificationFailed where the dtype does not hold the model, QloraError where the model
    cannot be judged.
    """
    case = _SettingsChoice(run, run.base_folder, base, observer)
    if insisted:
        return case.choose_settings(tensors, "asked for")
    try:
        return case.choose_settings(
            replace(tensors, dtype=PREFERRED), "the default, and it holds the model"
        )
    except VerificationFailed as fault:
        reason = f"float16 does not hold the model: {fault.what}"
        observer.note(f"WARNING: {reason}; bfloat16 is written instead")
        return case.choose_settings(replace(tensors, dtype=INSTEAD), reason)


@dataclass(frozen=True)
class _SettingsChoice:
    """kind: the base that was asked for."""

    run: Run
    base: Path
    kind: str
    observer: Observer

    def choose_settings(self, tensors: MergedTensors, reason: str) -> MergeSettings:
        judgement = self._judgement(tensors)
        tensors = replace(tensors, base=judgement.base)
        fit = None
        if tensors.dtype is torch.float16:
            fit = check_dtype_range(tensors, self.base, self.judged.rows)
        return MergeSettings(tensors, judgement, reason, fit)

    def _judgement(self, tensors: MergedTensors) -> BaseChoice:
        if self.kind in ("original", "dequantized"):
            return BaseChoice(self.kind, "asked for")  # type: ignore[arg-type]
        judgement = choose_base(tensors, self.base, lambda: self.judged)
        for line in judgement.lines():
            self.observer.note(line)
        return judgement

    @cached_property
    def judged(self) -> EvalRows:
        found = eval_rows(self.run.recipe, self.base, read_config(self.base / CONFIG))
        for note in found.notes:
            self.observer.note(note)
        return found
