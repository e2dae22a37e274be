"""`--base auto`: which base the adapter is merged into, judged by what the merged models answer.

Both candidates are built as they would be written, from the same tensors, one after the other, and
compared with the trained model (adapter on the frozen, packed base) on held-out rows. The rule:

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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.checkpoint.open import base_folder, read_recipe
from qlora_cli.errors import QloraError
from qlora_cli.events import Observer
from qlora_cli.export.candidates import as_written, place_to_answer, trained_and_frozen
from qlora_cli.export.judge import Comparison, compare
from qlora_cli.export.rows import judged_rows
from qlora_cli.export.tensors import Base, MergedTensors
from qlora_cli.weights.locate import read_config

KINDS: tuple[Base, ...] = ("original", "dequantized")


@dataclass(frozen=True)
class Judgement:
    """The base to merge into, and why. table: each candidate against the trained model."""

    base: Base
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


def choose_base(run: RunFolder, tensors: MergedTensors, observer: Observer) -> Judgement:
    """The base for a run's merge. tensors: the merge into either base.

    Raises QloraError where neither merged model answers in finite numbers.
    """
    if tensors.adapter is None:
        return Judgement("original", "every weight was trained; there is no adapter to add")
    if tensors.held.bits == 16:
        return Judgement("original", "the base was not quantized in training")
    place = place_to_answer(tensors)
    if place is None:
        return Judgement(
            "dequantized",
            "the merged model is too large for this machine to judge, and to the base that it was "
            "trained on the adapter certainly fits",
        )
    return _judge(run, tensors, place, observer)


def loses_fine_tune(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    """The rule at the top. All three against the trained model, on the same rows."""
    return not math.isfinite(original.mean_kl) or (
        _is_far(original, dequantized, frozen) and original.loss > dequantized.loss
    )


def _is_far(original: Comparison, dequantized: Comparison, frozen: Comparison) -> bool:
    return original.mean_kl > dequantized.mean_kl + frozen.mean_kl / 2


def _judge(
    run: RunFolder, tensors: MergedTensors, place: torch.device, observer: Observer
) -> Judgement:
    base = base_folder(run)
    judged = judged_rows(read_recipe(run), base, read_config(base / "config.json"))
    for note in judged.notes:
        observer.note(note)
    trained, frozen = trained_and_frozen(run, tensors.device, judged.rows)
    original, dequantized = (
        compare(trained, as_written(run, replace(tensors, base=kind), place, judged.rows))
        for kind in KINDS
    )
    if not (math.isfinite(original.mean_kl) or math.isfinite(dequantized.mean_kl)):
        raise QloraError(
            f"merged to {str(tensors.dtype).removeprefix('torch.')} the model answers NaN",
            hint="its activations overflow; merge with --dtype bfloat16",
        )
    told = (original, dequantized, compare(trained, frozen))
    lost = loses_fine_tune(*told)
    table = tuple(zip((*KINDS, "no adapter"), told, strict=True))
    kind: Base = "dequantized" if lost else "original"
    return Judgement(kind, _reason(lost, _is_far(*told)), judged.origin, table)


def _reason(lost: bool, far: bool) -> str:
    if lost:
        return "merged into the original base it loses the fine-tune"
    if far:
        return "on the original base it answers otherwise, but no worse"
    return "on the original base it keeps the fine-tune, and that base was never rounded"
