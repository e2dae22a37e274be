"""The check that no trained tensor with NaN or infinite values is written to a file."""

from __future__ import annotations

from torch import Tensor

from qlora_cli.errors import NotFinite
from qlora_cli.files.safetensors_io import is_finite

DIVERGENCE_HINT = (
    "lower train.lr, set train.max_grad_norm or lengthen train.warmup; use base.compute_dtype="
    "bfloat16 or float32 and adapter.dtype=float32 if they are float16; a changed recipe needs "
    "a new run, with another output"
)


def finite_cpu_copy(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` on the CPU, or `tensor` itself if it is there already.

    name: the tensor's name for the error message.

    Raises NotFinite if a value is NaN or infinite. The check runs on the CPU, so that it takes no
    GPU memory.
    """
    values = tensor.detach().cpu()
    if not is_finite(values):
        raise NotFinite(f"{name} is not finite", hint=DIVERGENCE_HINT)
    return values
