"""Trained values that are NaN or infinite are never written.

Each tensor is checked on the host, on its way to a file: that takes no memory on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.errors import NotFinite
from qlora_cli.weights.tensorfile import is_finite

ADVICE = (
    "lower train.lr, set train.max_grad_norm or lengthen train.warmup; use base.compute_dtype="
    "bfloat16 or float32 and adapter.dtype=float32 where they are float16; a changed recipe needs "
    "a new run, with another output"
)


def on_host(name: str, tensor: Tensor) -> Tensor:
    """The values of `tensor` on the host.

    name: of the tensor, for the error. Raises NotFinite where a value is NaN or infinite.
    """
    values = tensor.detach().cpu()
    if not is_finite(values):
        raise NotFinite(f"{name} is not finite", hint=ADVICE)
    return values


@contextmanager
def last_checkpoint_named(run: RunFolder) -> Iterator[None]:
    """Adds the step and the path of the last checkpoint of `run` to a NotFinite, or its absence."""
    try:
        yield
    except NotFinite as fault:
        steps = run.steps()
        last = "there is no checkpoint"
        if steps:
            last = f"the last good checkpoint is of step {steps[-1]}: {run.checkpoint(steps[-1])}"
        raise NotFinite(fault.what, where=fault.where, hint=f"{last}; {fault.hint}") from fault
