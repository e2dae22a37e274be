"""Find where the first NaN or infinite value of a forward pass is computed, and for which row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.collate import Batch
from qlora_cli.tasks.task import MetricSums
from qlora_cli.train.state import State


@dataclass
class _Found:
    """The first module whose output is not finite. token: the first such position, if known."""

    path: str
    token: int | None


@torch.no_grad()
def describe_nonfinite(state: State, batches: Sequence[Batch]) -> str | None:
    """Return the first module whose output is not finite, and the row, as one clause.

    The forward pass of each micro-batch runs a second time. Returns None if all outputs are finite,
    or if this pass fails.
    """
    for batch in batches:
        with _watched(state.loaded.model) as found:
            try:
                state.task.loss(state.loaded, batch, state.device, 1.0, MetricSums())
            except RuntimeError:  # Such as a lack of memory: the first error is reported then.
                return None
        if found:
            return _clause(found[0], batch)
    return None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Found]]:
    """Yield the list that receives the first module whose output is not finite."""
    found: list[_Found] = []

    def watch(path: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if found or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return
        if not (finite := tensor.isfinite()).all():
            token = None
            if tensor.dim() == 3 and tensor.shape[0] == 1:
                token = int((~finite.all(dim=2)).squeeze(0).nonzero()[0])
            found.append(_Found(path, token))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda _, __, output, path=path: watch(path, output)
            )
            stack.callback(hook.remove)
        yield found


def _clause(found: _Found, batch: Batch) -> str:
    text = f"the first values that are not finite are computed by {found.path or 'the model'}"
    if found.token is None or not batch.origins:
        return text
    segment = bisect_right(list(accumulate(batch.segments)), found.token)
    return f"{text}, for the row {batch.origins[segment]}"
