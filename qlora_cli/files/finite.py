"""Trained values that are NaN or infinite are never written."""

from __future__ import annotations

from torch import Tensor

from qlora_cli.errors import NotFinite
from qlora_cli.files.safetensors_io import is_finite

DIVERGENCE_HINT = (
    "lower train.lr, set train.max_grad_norm or lengthen train.warmup; use base.compute_dtype="
    "bfloat16 or float32 and adapter.dtype=float32 where they are float16; a changed recipe needs "
    "a new run, with another output"
)


def finite_cpu_copy(name: str, tensor: Tensor) -> Tensor:
    """The values of `tensor` on the host.

    name: of the tensor, for the error. Raises NotFinite where a value is NaN or infinite.
    """
    values = tensor.detach().cpu()
    if not is_finite(values):
        raise NotFinite(f"{name} is not finite", hint=DIVERGENCE_HINT)
    return values
