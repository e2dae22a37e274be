"""Check whether a merged model fits the range of a narrow output dtype, that is, of float16.

Three things can go wrong. A weight can be too large (beyond 65504). A weight can be too small
(below 3e-8 it becomes 0). And a model of finite weights can still compute NaN, because an
activation overflows. Therefore every weight is cast once and its underflow is counted, and
transformers' own model runs held-out rows in this dtype. The output of every module must be finite.
The logits alone would not show every overflow, because a softmax can turn an infinity into a finite
number.

A GPU's float16 matrix product accumulates in float32 and rounds the sum to float16. On a CPU the
same is done in two steps, a float32 product and a cast. torch's own float16 product on a CPU gives
the same result within one rounding and takes eight times as long (measured: 512 x 2048 x 5632,
torch 2.13, 2 cores without AVX512-FP16).
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
from qlora_cli.export.options import FALLBACK_DTYPE, has_narrow_range
from qlora_cli.files.dtype import dtype_name

MAX_LOST = 0.01
"""Share of one tensor's values that may become 0. If Gaussian values lose so many, float16 rounds
the others by 0.7 % of their spread, more than bfloat16 would."""
_MAX_TOKENS = 512
"""Number of tokens that the activations are checked on at most."""
_HINT = f"{FALLBACK_DTYPE} has the range of float32: merge with --dtype {FALLBACK_DTYPE}"


@dataclass(frozen=True)
class DtypeFit:
    """How a merged model fits the range of its dtype. The field names are keys of merge.json.

    largest_activation: largest absolute value in any module's output on held-out rows.
    lost: share of all weights that became 0.
    most_lost, in_tensor: the same share for the tensor that lost most, and that tensor's name.
    """

    largest_activation: float
    lost: float
    most_lost: float
    in_tensor: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for merge.json."""
        return asdict(self)


def check_dtype_range(tensors: MergedTensors, base: Path, rows: Sequence[Example]) -> DtypeFit:
    """Return how the merged model fits the range of `tensors.dtype`.

    tensors: the merge, with an output dtype of narrow range.
    base: the base's folder, for its config.
    rows: the model runs on the first of these rows.

    Raises VerificationFailed, naming the tensor or the module, if the model does not fit.
    """
    dtype_text = dtype_name(tensors.dtype)
    assert has_narrow_range(dtype_text)
    underflow = Underflow()
    model = merged_model(tensors, base, tensors.dtype, underflow)
    largest = largest_activation(model, rows, tensors.dtype)
    for name in tensors.shapes():
        if name not in underflow.tensors:
            tensors.compute(name, underflow)
    del model
    free_memory()
    share, name = underflow.largest_share()
    if share > MAX_LOST:
        raise VerificationFailed(
            f"{name} loses {share:.1%} of its values in {dtype_text}: they become 0", hint=_HINT
        )
    return DtypeFit(largest, underflow.share(), share, name)


def largest_activation(
    model: ComparisonModel, rows: Sequence[Example], dtype: torch.dtype
) -> float:
    """Return the largest absolute value in any module's output, logits included.

    model: a model that computes in `dtype`.

    Raises VerificationFailed, naming the module, if a value is infinite or NaN.
    """
    activation_range = _ActivationRange(dtype)
    family = model.loaded.family
    for path, module in model.loaded.model.get_submodule(family.backbone).named_modules():
        name = f"{family.backbone}.{path}".rstrip(".")
        module.register_forward_hook(partial(activation_range.record, name))
    for _, logits in model.compared_logits(_first_tokens(rows)).logits():
        # A head in this dtype rounds its logits to it; the comparison computes them in float32.
        activation_range.record(family.head, None, None, logits.to(dtype))
    return activation_range.largest


@dataclass
class _ActivationRange:
    """The largest absolute value that forward hooks have recorded.

    dtype: the dtype that the model computes in.
    """

    dtype: torch.dtype
    largest: float = 0.0

    def record(self, path: str, module: Any, inputs: Any, output: Any) -> None:
        """Record a module's output. path: the module's path in the model."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        largest = float(output.abs().max())
        # `not <` also catches NaN.
        if not largest < math.inf:
            raise VerificationFailed(
                f"the activations overflow in {dtype_name(self.dtype)}: the output of {path} "
                f"reaches {largest:g} on the compared rows, although all weights are finite",
                hint=_HINT,
            )
        self.largest = max(self.largest, largest)


def _first_tokens(rows: Sequence[Example]) -> list[Example]:
    """Return the first rows with at most `_MAX_TOKENS` tokens together.

    The first row is cut to that length. Every token becomes a label, so that the logits at every
    position are computed.
    """
    kept: list[Example] = []
    remaining = _MAX_TOKENS
    for row in rows:
        if len(row.ids) > remaining and kept:
            break
        kept.append(Example(row.ids[:remaining], row.ids[:remaining], row.origin))
        remaining -= len(row.ids)
    return kept
