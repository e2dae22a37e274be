"""Choose the base and the dtype of a merge, and record the reasons.

The dtype is the one that the user names, else float16 (`options.DEFAULT_DTYPE`). If the model does
not fit the range of float16, bfloat16 is written instead, with a warning. If the user named float16
and the model does not fit, the merge fails. For a base in MXFP4 the default is bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_cli.errors import VerificationFailed
from qlora_cli.events import Observer
from qlora_cli.export.compare.dtype_range import DtypeFit, check_dtype_range
from qlora_cli.export.compare.eval_rows import EvalRows, eval_rows
from qlora_cli.export.merge.base_choice import BaseChoice, choose_base
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.options import (
    DEFAULT_DTYPE,
    FALLBACK_DTYPE,
    MERGE_BASES,
    has_narrow_range,
)
from qlora_cli.files.dtype import dtype_name, torch_dtype
from qlora_cli.files.locate import read_config
from qlora_cli.files.quantized import MXFP4, stored_as
from qlora_cli.runs.run import Run


@dataclass(frozen=True)
class MergeSettings:
    """What a merge writes, and why.

    tensors: the tensors to write, in the chosen base and dtype.
    base_choice: the base and its reason.
    dtype_reason: why this dtype, as text for the user.
    fit: how the model fits the dtype's range; None for a dtype that needs no check.
    """

    tensors: MergedTensors
    base_choice: BaseChoice
    dtype_reason: str
    fit: DtypeFit | None

    def to_dict(self) -> dict[str, Any]:
        """Return the reasons for merge.json."""
        return {
            "judgement": self.base_choice.to_dict(),  # words: allow
            "dtype_reason": self.dtype_reason,
            "float16": self.fit.to_dict() if self.fit is not None else None,
        }


def choose_settings(
    run: Run, tensors: MergedTensors, base: str, dtype: str | None, observer: Observer
) -> MergeSettings:
    """Choose the base and the dtype of a merge.

    tensors: the merge of `run`, into any base and in any dtype.
    base: `original`, `dequantized` or `auto`.
    dtype: the name of the output dtype; None for the default, or bfloat16 if the model does not fit
        the default's range.
    observer: receives the comparison of the bases and warnings.

    Raises VerificationFailed if the model does not fit the dtype, QloraError if the trained model
    computes NaN, so that no base can be chosen.
    """
    choice = _SettingsChoice(run, run.base_folder, base, observer)
    if dtype is not None:
        return choice.in_dtype(tensors, dtype, "requested")
    if stored_as(read_config(run.base_folder / CONFIG)) == MXFP4:
        reason = f"the weights that are stored in MXFP4 are {FALLBACK_DTYPE} numbers"
        return choice.in_dtype(tensors, FALLBACK_DTYPE, reason)
    try:
        return choice.in_dtype(tensors, DEFAULT_DTYPE, "the default; the model fits its range")
    except VerificationFailed as fault:
        reason = f"the model does not fit the range of {DEFAULT_DTYPE}: {fault.what}"
        observer.note(f"WARNING: {reason}; {FALLBACK_DTYPE} is written instead")
        return choice.in_dtype(tensors, FALLBACK_DTYPE, reason)


@dataclass(frozen=True)
class _SettingsChoice:
    """The settings that do not depend on the dtype.

    base_folder: the base's folder. requested_base: `original`, `dequantized` or `auto`.
    """

    run: Run
    base_folder: Path
    requested_base: str
    observer: Observer

    def in_dtype(self, tensors: MergedTensors, dtype: str, reason: str) -> MergeSettings:
        """Return the settings of a merge in this dtype. Raises VerificationFailed."""
        tensors = replace(tensors, dtype=torch_dtype(dtype))
        base_choice = self._choose_base(tensors)
        tensors = replace(tensors, base=base_choice.base)
        fit = None
        if has_narrow_range(dtype_name(tensors.dtype)):
            fit = check_dtype_range(tensors, self.base_folder, self._rows.rows)
        return MergeSettings(tensors, base_choice, reason, fit)

    def _choose_base(self, tensors: MergedTensors) -> BaseChoice:
        if self.requested_base in MERGE_BASES:
            return BaseChoice(self.requested_base, "requested")
        base_choice = choose_base(tensors, self.base_folder, lambda: self._rows)
        for line in base_choice.lines():
            self.observer.note(line)
        return base_choice

    @cached_property
    def _rows(self) -> EvalRows:
        rows = eval_rows(self.run.recipe, self.base_folder, read_config(self.base_folder / CONFIG))
        for note in rows.notes:
            self.observer.note(note)
        return rows
