"""Check the predictions of a merged folder against those of the trained model.

Checks 3 to 5 of `verification.py`, which defines them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_cli.data.encode import Example
from qlora_cli.errors import VerificationFailed
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
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.options import has_narrow_range
from qlora_cli.export.verify.file_checks import loading_faults
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.locate import read_config
from qlora_cli.runs.run import Run

ROUNDING_KL = 1e-4
"""Nats that rounding the weights may cost: ten times what rounding them to float16 costs at most on
random tiny models."""
_BASE_CHANGE_FACTOR = 4.0
"""The fine-tuned model may be more sensitive to a change of the base than the base itself is."""


@dataclass(frozen=True)
class PredictionReport:
    """How the merged folder's predictions compare with the trained model's.

    comparison: on the held-out rows. greedy: on a greedy continuation; None for a model that
    generates no text. faults: failed checks.
    explanation: what the figures include and which are checked, one sentence each.
    """

    comparison: Comparison
    greedy: GreedyAgreement | None
    faults: tuple[str, ...]
    explanation: tuple[str, ...]


def compare_predictions(
    merged: Path, run: Run, expected: MergedTensors, observer: Observer
) -> PredictionReport:
    """Compare the merged folder with the trained model on held-out rows.

    merged: the merged folder, which has every tensor of `expected` in the right shape.
    run: the run that it was merged from.
    expected: the tensors that merging must write.
    observer: receives notes about the rows.
    """
    base = run.base_folder
    rows = eval_rows(run.recipe, base, read_config(base / CONFIG))
    for note in rows.notes:
        observer.note(note)
    may_be_resident = run.recipe.base.residency != "disk"
    model = trained_model(expected, base, may_be_resident)
    trained = model.compared_logits(rows.rows)
    is_classifier = model.loaded.family.is_classifier
    continuation = [] if is_classifier else [greedy_continuation(model, rows.rows)]
    frozen = frozen_base_model(model, expected, base).compared_logits(rows.rows)
    del model
    free_memory()
    faults = list(loading_faults(merged, expected.task.model_class))
    model = folder_model(expected.task, merged, expected.dtype, expected.device)
    predictions = model.compared_logits([*rows.rows, *continuation])
    num = trained.targets.numel()
    comparison = compare(trained, predictions[:num], rows.signs)
    base_kl = _base_change_kl(expected, base, rows, frozen)
    faults += divergence_faults(rows, base_kl, comparison, _is_base_changed(expected))
    if rows.is_task_data and _is_base_changed(expected):
        faults += _lost_fine_tune_faults(expected, base, rows, trained, frozen, comparison)
    if has_narrow_range(dtype_name(expected.dtype)):
        faults += _overflow_faults(merged, expected, rows.rows)
    greedy = count_agreeing_tokens(predictions[num:]) if continuation else None
    explanation = tuple(explain(_is_base_changed(expected), base_kl, greedy))
    return PredictionReport(comparison, greedy, tuple(faults), explanation)


def explain(is_base_changed: bool, base_kl: float, greedy: GreedyAgreement | None) -> Iterator[str]:
    """Yield what the figures of a verification include, one sentence each.

    is_base_changed: whether the adapter is added to other weights than it was trained on. base_kl:
    mean KL that the change of the base causes without the adapter.
    """
    cause = "rounding"
    if is_base_changed:
        cause = "the change of the base"
        yield (
            "The adapter was trained on a quantized base and is merged into the original base, so "
            "all differences include what quantization changed. A merge with --base dequantized "
            "has no such difference."
        )
    yield (
        f"Checked: the mean KL may be up to {_allowed_kl(base_kl):.3g} nats, computed from the "
        f"{base_kl:.3g} nats by which {cause} changes the base without the adapter."
    )
    if greedy is None:
        return
    yield (
        "Not checked: the largest difference, because it is that of a single logit, and often of "
        "an unlikely token."
    )
    if greedy.num_agreeing < greedy.num_tokens:
        yield (
            "Not checked: greedy decoding, because it stops agreeing at the first token that "
            f"{cause} changes, for example if two tokens are almost equally likely."
        )


def _allowed_kl(base_kl: float) -> float:
    return _BASE_CHANGE_FACTOR * base_kl + ROUNDING_KL


def _base_change_kl(
    expected: MergedTensors, base: Path, rows: EvalRows, frozen: ComparedLogits
) -> float:
    """Return the mean KL between the base as trained on and the base as merged into.

    frozen: predictions of the base as it was trained on.
    """
    alone = merged_model(expected.before_training(), base).compared_logits(rows.rows)
    return compare(frozen, alone).mean_kl


def divergence_faults(
    rows: EvalRows, base_kl: float, comparison: Comparison, is_base_changed: bool
) -> Iterator[str]:
    """Yield a fault if the merged model is too far from the trained model (check 3).

    base_kl: mean KL that the change of the base causes without the adapter. comparison: trained
    against merged. is_base_changed: whether the adapter is added to other weights than it was
    trained on.
    """
    allowed = _allowed_kl(base_kl)
    # `not <=` also reports NaN.
    if not comparison.mean_kl <= allowed:
        # The same merge would give the same difference.
        again = "merge again with --base dequantized" if is_base_changed else "merge again"
        yield (
            f"the predictions differ from the trained model's: the mean KL on {rows.origin} is "
            f"{comparison.mean_kl:.3g} nats, and at most {allowed:.3g} is allowed; {again}"
        )


def _lost_fine_tune_faults(
    expected: MergedTensors,
    base: Path,
    rows: EvalRows,
    trained: ComparedLogits,
    frozen: ComparedLogits,
    comparison: Comparison,
) -> Iterator[str]:
    """Yield a fault if the merge into the original base lost the fine-tuning (check 4).

    trained, frozen: predictions of the trained model and of its frozen base. comparison: trained
    against merged.
    """
    dequantized = merged_model(replace(expected, base="dequantized"), base)
    other = compare(trained, dequantized.compared_logits(rows.rows), rows.signs)
    if loses_fine_tune(comparison, other, compare(trained, frozen, rows.signs)):
        yield (
            "the merge into the original base lost the fine-tuning; merge again with "
            "--base dequantized"
        )


def _overflow_faults(
    merged: Path, expected: MergedTensors, rows: Sequence[Example]
) -> Iterator[str]:
    """Yield a fault if an activation overflows in the dtype of the weights (check 5)."""
    dtype = expected.dtype
    model = folder_model(expected.task, merged, dtype, expected.device, compute=dtype)
    try:
        largest_activation(model, rows, dtype)
    except VerificationFailed as fault:
        yield f"{fault.what}; {fault.hint}"


def _is_base_changed(expected: MergedTensors) -> bool:
    """Return whether the adapter is added to other weights than it was trained on."""
    is_quantized = expected.adapter is not None and expected.base_format.is_quantized
    return is_quantized and expected.base == "original"
