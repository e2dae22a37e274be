"""Does the merged model hold in float16?

Its weights may be too large (beyond 65504) or too small (under 3e-8 they become 0), and finite
weights can still give NaN: an activation overflows on its way. So all weights are cast once and
counted, and the model as transformers runs it answers held-out rows in float16. Every module's
output must be finite; an infinity can vanish again behind a softmax, so the answer alone would not
tell.

A card's float16 product adds in float32 and rounds the sum to float16. On a CPU the same is done in
two steps, a float32 product and a cast; torch's own float16 product there comes to the same within
a rounding, in eight times the time (measured: 512 x 2048 x 5632, torch 2.13, 2 cores without
AVX512-FP16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.errors import VerificationFailed
from qlora_cli.export.compare.comparison_models import ComparisonModel, merged_model
from qlora_cli.export.compare.logit_comparison import free_memory
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.underflow import Underflow

MAX_LOST = 0.01
"""Share of one tensor's values that may become 0. Where Gaussian values lose so many, float16
rounds the others by 0.7 % of their spread, more than bfloat16 would."""
_TOKENS = 512
"""Asked for at most."""
_HINT = "bfloat16 has the range of float32: merge with --dtype bfloat16"


@dataclass(frozen=True)
class Float16Fit:
    """How a merged model fits into float16.

    largest_activation: of any module's output on held-out rows. lost: share of the weights that
    became 0; most_lost, in_tensor: of the tensor that lost most.
    """

    largest_activation: float
    lost: float
    most_lost: float
    in_tensor: str

    def to_dict(self) -> dict[str, Any]:
        """For merge.json."""
        return asdict(self)


def check_float16(tensors: MergedTensors, base: Path, rows: Sequence[Example]) -> Float16Fit:
    """Raises VerificationFailed, naming the tensor or the module, where it does not hold."""
    assert tensors.dtype is torch.float16
    underflow = Underflow()
    comparison_model = merged_model(tensors, base, torch.float16, underflow)
    largest = largest_activation(comparison_model, rows)
    for name in tensors.shapes():
        if name not in underflow.tensors:
            tensors.make(name, underflow)
    del comparison_model
    free_memory()
    most, name = underflow.worst()
    if most > MAX_LOST:
        raise VerificationFailed(
            f"{name} loses {most:.1%} of its values in float16: they become 0", hint=_HINT
        )
    return Float16Fit(largest, underflow.share(), most, name)


def largest_activation(comparison_model: ComparisonModel, rows: Sequence[Example]) -> float:
    """Of any module's output, logits included. Raises VerificationFailed where it is beyond."""
    watch = _Watch()
    backbone = comparison_model.loaded.family.backbone
    for path, module in comparison_model.loaded.model.get_submodule(backbone).named_modules():
        module.register_forward_hook(partial(watch.see, f"{backbone}.{path}".rstrip(".")))
    for _, logits in comparison_model.compared_logits(_few(rows)).logits():
        # A head rounds them to float16, too; here they are float32.
        watch.see(comparison_model.loaded.family.head, None, None, logits.half())
    return watch.largest


@dataclass
class _Watch:
    """A hook behind every module."""

    largest: float = 0.0

    def see(self, path: str, _: Any, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        largest = float(output.abs().max())
        # Written so that NaN is caught.
        if not largest < math.inf:
            raise VerificationFailed(
                f"in float16 the activations overflow: {path} gives {largest:g} on the judged "
                "rows, though the weights are finite",
                hint=_HINT,
            )
        self.largest = max(self.largest, largest)


def _few(rows: Sequence[Example]) -> list[Example]:
    """The first rows, up to `_TOKENS` together, the first of them cut to that; all is answered."""
    kept: list[Example] = []
    room = _TOKENS
    for row in rows:
        if len(row.ids) > room and kept:
            break
        kept.append(Example(row.ids[:room], row.ids[:room], row.origin))
        room -= len(row.ids)
    return kept
