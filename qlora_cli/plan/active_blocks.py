"""Report to a recording which block of the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_cli.plan.recording import Recording


def report_active_blocks(blocks: Any, recording: Recording) -> None:
    """Report to the recording which block runs, in the forward and the backward pass."""
    for index, block in enumerate(blocks):
        path = f"{recording.blocks}.{index}"
        block.forward = _reporting_forward(block.forward, path, recording)


def _reporting_forward(
    forward: Callable[..., Any], path: str, recording: Recording
) -> Callable[..., Any]:
    def reporting_forward(*args: Any, **kwargs: Any) -> Any:
        # The block stays active until the next one runs, because it frees the previous one's
        # output.
        recording.enter_module(path)
        output = forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: recording.enter_module(path))
        return output

    return reporting_forward
