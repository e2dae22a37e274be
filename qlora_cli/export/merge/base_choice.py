"""`--base auto`: which base the adapter is merged into, judged by what the merged models answer.

Both candidates are made as they would be written, tensor by tensor and one after the other, and
compared with the trained model (adapter on the frozen, packed base) on held-out rows; none of these
models is held (`stream.py`), so one of any size can be judged. The rule:

    `original`, unless it loses the fine-tune. It loses it where, on these rows,
    KL(trained || original) > KL(trained || dequantized) + 1/2 KL(trained || frozen base)
    and its loss is higher than that of `dequantized`.

KL(trained || frozen base) is how much the fine-tune changed the answers at all: a merge that is
half as far from the trained model as no adapter is has lost the point of it. As a rule the original
base is the better 16-bit model, because it never was rounded; it is the worse one where
quantization moved the base further than the adapter did (large weights behind small multipliers,
as in Falcon-H1), because then the adapter is fitted to the rounded base.
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
from qlora_cli.export.merge.merged_tensors import MergeBase, MergedTensors

KINDS: tuple[MergeBase, ...] = ("original", "dequantized")


@dataclass(frozen=True)
class BaseChoice:
    """The base to merge into, and why. table: each candidate against the trained model."""

    base: MergeBase
    reason: str
    rows: str = ""
    table: tuple[tuple[str, Comparison], ...] = ()

    def lines(self) -> list[str]:
        """The table and the choice, one line each."""
        shown = [
            f"{name}: KL {told.mean_kl:.3g} nats, perplexity {told.perplexity:.4g}, "
            f"same first choice {told.top1_agreement:.2%}"
            for name, told in self.table
        ]
        heading = [f"judged against the trained model on {self.rows}:"] if shown else []
        return [*heading, *shown, f"base = {self.base}: {self.reason}"]

    def to_dict(self) -> dict[str, Any]:
        """For merge.json."""
        return {
            "base": self.base,
            "reason": self.reason,
            "rows": self.rows,
            "table": {name: asdict(told) for name, told in self.table},
        }


def choose_base(tensors: MergedTensors, base: Path, judged: Callable[[], EvalRows]) -> BaseChoice:
    """The base for a merge. tensors: the merge into either base; base: its folder.

    judged: gives the rows, where they are needed. Raises QloraError where the trained model or
    both merged ones do not answer in finite numbers.
    """
    if tensors.adapter is None:
        return BaseChoice("original", "every weight was trained; there is no adapter to add")
    if tensors.weight_format.bits == 16:
        return BaseChoice("original", "the base was not quantized in training")
    return _judge(tensors, base, judged())


def loses_fine_tune(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    """The rule at the top. All three against the trained model, on the same rows."""
    return not math.isfinite(original.mean_kl) or (
        _is_far(original, dequantized, frozen) and original.loss > dequantized.loss
    )


def _is_far(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    return original.mean_kl > dequantized.mean_kl + frozen.mean_kl / 2


def _judge(tensors: MergedTensors, base: Path, judged: EvalRows) -> BaseChoice:
    model = trained_model(tensors, base, may_be_resident=False)
    reference = model.compared_logits(judged.rows)
    model = frozen_base_model(model, tensors, base)
    frozen = compare(reference, model.compared_logits(judged.rows))
    del model
    free_memory()
    original, dequantized = (
        compare(
            reference, merged_model(replace(tensors, base=kind), base).compared_logits(judged.rows)
        )
        for kind in KINDS
    )
    if not (math.isfinite(original.mean_kl) or math.isfinite(dequantized.mean_kl)):
        raise QloraError(
            "the trained model answers NaN, so no merged one can be judged by it",
            hint="its training overflowed; look at the losses with `qlora report`",
        )
    told = (original, dequantized, frozen)
    lost = loses_fine_tune(*told)
    table = tuple(zip((*KINDS, "no adapter"), told, strict=True))
    kind: MergeBase = "dequantized" if lost else "original"
    return BaseChoice(kind, _reason(lost, _is_far(*told)), judged.origin, table)


def _reason(lost: bool, far: bool) -> str:
    if lost:
        return "merged into the original base it loses the fine-tune"
    if far:
        return "on the original base it answers otherwise, but no worse"
    return "on the original base it keeps the fine-tune, and that base was never rounded"
