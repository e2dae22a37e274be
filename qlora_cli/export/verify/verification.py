"""Proof that a merged checkpoint is the model that was trained.

It passes where all of this holds:

1. Tensors: names, shapes and dtypes are those of the base, in the merged dtype; every tensor is bit
   for bit what base and adapter give (`proof.py`); no layer of the adapter is missing.
2. Files: config, tokenizer, templates and generation settings are the base's.
3. Answers: transformers loads the folder without a missing or unexpected key, and on held-out rows
   KL(trained || merged) <= 4 KL(frozen base || the base as merged into) + `ROUNDING`,
   where both bases are without the adapter. So what the base's own change costs is measured on the
   same rows: next to nothing where it is `dequantized` and arithmetic was float32; the arithmetic
   of 16 bit or of int8 activations where training used them; the whole quantization where it is
   `original`. Four times that, because the fine-tuned model may be the more sensitive one.
4. Where an adapter trained on a packed base is merged into `original`: the fine-tune survives by
   the rule of `choose.py` (on rows of the task only).
5. Where it is in float16: its activations do not overflow on these rows (`float16.py`).

How many greedy tokens are the same is told (`greedy.py`) and is no fault: the same weights in other
arithmetic may fall on the other side of a tie.

No model is held: tensors are compared one at a time, and models answer streamed (`candidates.py`,
where it also stands how each of them computes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_cli.data.encode import Example
from qlora_cli.errors import InputError, UsageError, VerificationFailed
from qlora_cli.events import Observer
from qlora_cli.export.compare.comparison_models import (
    folder_model,
    frozen_base_model,
    merged_model,
    trained_model,
)
from qlora_cli.export.compare.dtype_range import largest_activation
from qlora_cli.export.compare.eval_rows import EvalRows, eval_rows
from qlora_cli.export.compare.greedy_agreement import (
    GreedyAgreement,
    count_agreeing_tokens,
    greedy_continuation,
)
from qlora_cli.export.compare.logit_comparison import (
    ComparedLogits,
    Comparison,
    compare,
    free_memory,
)
from qlora_cli.export.merge.base_choice import loses_fine_tune
from qlora_cli.export.merge.combine import weighted_adapters_of
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.manifest import MANIFEST, MergeManifest
from qlora_cli.export.merge.merged_tensors import MergedTensors, open_merged_tensors
from qlora_cli.export.options import has_narrow_range
from qlora_cli.export.verify.checks import (
    config_faults,
    file_faults,
    loading_faults,
    structure_faults,
    value_faults,
)
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.locate import read_config
from qlora_cli.runs.run import Run

ROUNDING = 1e-4
"""Nats: ten times what rounding the weights to float16 cost at most on random tiny models."""
_TIMES = 4.0
MAX_FAULTS = 10
"""Told one by one; the rest is counted."""


@dataclass(frozen=True)
class VerificationReport:
    """Passed where there is no fault. Figures are None where the tensors cannot be a model."""

    faults: tuple[str, ...]
    comparison: Comparison | None = None
    greedy: GreedyAgreement | None = None

    @property
    def passed(self) -> bool:
        """No fault was found."""
        return not self.faults


def verify(merged: Path, run: Run, device: torch.device, observer: Observer) -> VerificationReport:
    """Compares the folder with the run.

    Raises UsageError where `merged` is no model's folder or the run is none or not finished,
    ModelError where the run's base is gone.
    """
    if not (merged / CONFIG).is_file():
        raise UsageError(f"{merged} is no model's folder", hint="it must hold config.json")
    base = run.base_folder
    try:
        made = MergeManifest.read(merged)
        expected = open_merged_tensors(run, made.base, made.dtype, device, made.weight, made.others)
    except UsageError:
        raise
    except InputError as fault:
        return VerificationReport((f"what it should be cannot be told: {fault}",))
    for note in made.notes():
        observer.note(note)
    broken = [*structure_faults(merged, expected), *config_faults(merged, base, expected.dtype)]
    faults = [*_origin_faults(made, expected), *broken, *file_faults(merged, base)]
    if broken:
        return VerificationReport(_shortened(faults))
    faults += value_faults(merged, expected, observer)
    comparison, greedy, more = _compare_answers(merged, run, expected, observer)
    return VerificationReport(_shortened([*faults, *more]), comparison, greedy)


def _origin_faults(made: MergeManifest, expected: MergedTensors) -> Iterator[str]:
    if expected.adapter is None or not made.digests:
        return
    own, *others = (term.to_dict()["digest"] for term in weighted_adapters_of(expected.adapter))
    if made.digests[0] != own:
        yield f"{MANIFEST} names another adapter than the run has now"
    for (folder, _), before, now in zip(made.others, made.digests[1:], others, strict=False):
        if before != now:
            yield f"the adapter in {folder} is another than {MANIFEST} names"


def _compare_answers(
    merged: Path, run: Run, expected: MergedTensors, observer: Observer
) -> tuple[Comparison | None, GreedyAgreement | None, list[str]]:
    """(merged against trained, what is wrong with that)."""
    base = run.base_folder
    judged = eval_rows(run.recipe, base, read_config(base / CONFIG))
    for note in judged.notes:
        observer.note(note)
    if _into_original(expected):
        observer.note(
            "the adapter was trained on a rounded base and merged into the original one: what "
            "rounding changed in the answers is in these figures; --base dequantized keeps it"
        )
    rows = judged.rows
    model = trained_model(expected, base, may_be_resident=True)
    reference, spoken = model.compared_logits(rows), greedy_continuation(model, rows)
    frozen = frozen_base_model(model, expected, base).compared_logits(rows)
    del model
    free_memory()
    faults = list(loading_faults(merged, expected.task.model_class))
    merged_folder = folder_model(expected.task, merged, expected.dtype, expected.device)
    found = merged_folder.compared_logits([*rows, spoken])
    num = reference.targets.numel()
    comparison, greedy = compare(reference, found[:num]), count_agreeing_tokens(found[num:])
    faults += _answer_faults(expected, base, judged, reference, frozen, comparison)
    if has_narrow_range(dtype_name(expected.dtype)):
        faults += _overflow(merged, expected, rows)
    return comparison, greedy, faults


def _answer_faults(
    expected: MergedTensors,
    base: Path,
    judged: EvalRows,
    reference: ComparedLogits,
    frozen: ComparedLogits,
    comparison: Comparison,
) -> Iterator[str]:
    """reference, frozen: the trained model's answers and its base's alone."""
    alone = merged_model(replace(expected, adapter=None), base).compared_logits(judged.rows)
    allowed = _TIMES * compare(frozen, alone).mean_kl + ROUNDING
    # Written so that NaN is a fault.
    if not comparison.mean_kl <= allowed:
        yield (
            f"its answers are {comparison.mean_kl:.3g} nats from the trained model's; "
            f"{allowed:.3g} are allowed"
        )
    if judged.is_task_data and _into_original(expected):
        other = merged_model(replace(expected, base="dequantized"), base).compared_logits(
            judged.rows
        )
        if loses_fine_tune(comparison, compare(reference, other), compare(reference, frozen)):
            yield "into the original base it lost the fine-tune; use --base dequantized"


def _overflow(merged: Path, expected: MergedTensors, rows: Sequence[Example]) -> Iterator[str]:
    model = folder_model(expected.task, merged, expected.dtype, expected.device, expected.dtype)
    try:
        largest_activation(model, rows, expected.dtype)
    except VerificationFailed as fault:
        yield fault.what


def _into_original(expected: MergedTensors) -> bool:
    """Whether the adapter was added to other values than it was trained on."""
    trained_on_other = expected.adapter is not None and expected.weight_format.bits < 16
    return trained_on_other and expected.base == "original"


def _shortened(faults: Sequence[str]) -> tuple[str, ...]:
    rest = len(faults) - MAX_FAULTS
    return (*faults[:MAX_FAULTS], *([f"and {rest} more"] if rest > 0 else []))
