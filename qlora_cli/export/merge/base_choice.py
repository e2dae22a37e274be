"""`--base auto`: choose the base by comparing the merged models with the trained model.

Both merged models are computed as they would be written, tensor by tensor and one after the other.
Each is compared with the trained model (the adapter on the frozen, packed base) on held-out rows.
All models run streamed (`models/placement/streamed.py`), one module in memory at a time, so a model
of any size can be compared. The rule:

    Choose `original`, unless the merge into it loses the fine-tuning, that is, unless on these rows
    KL(trained || original) > KL(trained || dequantized) + 1/2 KL(trained || frozen base)
    and the loss of `original` is higher than the loss of `dequantized`. For preference pairs this
    loss is the cross entropy of the chosen answers minus that of the rejected ones.

KL(trained || frozen base) measures how much the adapter changed the model's predictions. A merge
that is half as far from the trained model as the base without an adapter has lost much of the
fine-tuning. If it is 0, as with a trained head alone, `original` is chosen.

Usually the original base gives the better 16-bit model, because its weights were never quantized.
It gives the worse one if quantization changed the base more than the adapter did (large weights
next to small multipliers, as in Falcon-H1): then the adapter is fitted to the quantized base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import QloraError
from qlora_cli.export.compare.comparison_models import (
    frozen_base_model,
    merged_model,
    trained_model,
)
from qlora_cli.export.compare.eval_rows import EvalRows
from qlora_cli.export.compare.logit_comparison import Comparison, compare, free_memory
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.options import MERGE_BASES, MergeBase
from qlora_cli.files.locate import read_config
from qlora_cli.files.quantized import BITSANDBYTES, stored_as


@dataclass(frozen=True)
class BaseChoice:
    """The base to merge into, and why.

    base: the chosen base. reason: one clause for the user.
    rows_origin: the rows that the models were compared on, in words; empty without a comparison.
    table: (model, comparison with the trained model), for both merged models and the frozen base.
    """

    base: MergeBase
    reason: str
    rows_origin: str = ""
    table: tuple[tuple[str, Comparison], ...] = ()

    def lines(self) -> list[str]:
        """Return the table and the choice as lines of text for the user."""
        rows = [
            f"{name}: KL {comparison.mean_kl:.3g} nats, perplexity {comparison.perplexity:.4g}, "
            f"top-1 agreement {comparison.top1_agreement:.2%}"
            for name, comparison in self.table
        ]
        heading = [f"compared with the trained model on {self.rows_origin}:"] if rows else []
        return [*heading, *rows, f"base = {self.base}: {self.reason}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the choice for merge.json."""
        return {
            "base": self.base,
            "reason": self.reason,
            "rows": self.rows_origin,
            "table": {name: asdict(comparison) for name, comparison in self.table},
        }


def choose_base(
    tensors: MergedTensors, base: Path, read_rows: Callable[[], EvalRows]
) -> BaseChoice:
    """Choose the base for a merge by the rule of this module.

    tensors: the merge, into either base.
    base: the base's folder, for its config.
    read_rows: returns the rows to compare on; called only if a comparison is needed.

    Raises QloraError if the trained model, or both merged models, compute NaN.
    """
    if tensors.adapter is None:
        return BaseChoice("original", "all weights were trained; there is no adapter to add")
    if not tensors.base_format.is_quantized:
        return BaseChoice("original", "the base was not quantized in training")
    if is_stored_quantized(base):
        return BaseChoice("dequantized", "bitsandbytes quantized the checkpoint of the base")
    return _compare_bases(tensors, base, read_rows())


def is_stored_quantized(base: Path) -> bool:
    """Return whether bitsandbytes quantized the checkpoint in the folder `base`."""
    return stored_as(read_config(base / CONFIG)) == BITSANDBYTES


def loses_fine_tune(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    """Return whether the merge into the original base loses the fine-tuning (see the module).

    original, dequantized: the two merged models; frozen: the base without an adapter. All three are
    compared with the trained model on the same rows.
    """
    return not math.isfinite(original.mean_kl) or (
        _is_far(original, dequantized, frozen) and original.signed_loss > dequantized.signed_loss
    )


def _is_far(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    # Without effect on the predictions, as with a trained head alone, nothing can be lost.
    changes = frozen.mean_kl > 0
    return changes and original.mean_kl > dequantized.mean_kl + frozen.mean_kl / 2


def _compare_bases(tensors: MergedTensors, base: Path, rows: EvalRows) -> BaseChoice:
    model = trained_model(tensors, base, may_be_resident=False)
    reference = model.compared_logits(rows.rows)
    model = frozen_base_model(model, tensors, base)
    frozen = compare(reference, model.compared_logits(rows.rows), rows.signs)
    del model
    free_memory()
    original, dequantized = (
        compare(
            reference,
            merged_model(replace(tensors, base=kind), base).compared_logits(rows.rows),
            rows.signs,
        )
        for kind in MERGE_BASES
    )
    if not (math.isfinite(original.mean_kl) or math.isfinite(dequantized.mean_kl)):
        raise QloraError(
            "the trained model computes NaN, so no merged model can be compared with it",
            hint="the training overflowed; check the losses with `qlora report`",
        )
    comparisons = (original, dequantized, frozen)
    lost = loses_fine_tune(*comparisons)
    table = tuple(zip((*MERGE_BASES, "no adapter"), comparisons, strict=True))
    chosen: MergeBase = "dequantized" if lost else "original"
    return BaseChoice(chosen, _reason(lost, _is_far(*comparisons)), rows.origin, table)


def _reason(lost: bool, far: bool) -> str:
    if lost:
        return "the merge into the original base loses the fine-tuning"
    if far:
        return (
            "the merge into the original base differs from the trained model, but its loss is not "
            "higher"
        )
    return (
        "the merge into the original base keeps the fine-tuning, and that base was never quantized"
    )
