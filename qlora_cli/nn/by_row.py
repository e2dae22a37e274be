"""Runs a module that mixes tokens once for each row of a packed sequence.

Attention that goes through transformers' interface treats each row separately (`attention.py`).
Other modules that mix tokens cannot: convolutions, state-space and linear attention layers, and
attention with code of its own. They get one row at a time. All other modules of a block, which is
most of the work, compute all rows together.

A position table that counts tokens itself would count through the whole sequence. It gets the
longest row, and each row takes its first positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.spans import Spans, current_spans, use_spans


def run_by_row(module: nn.Module) -> None:
    """Change `module` so that it computes each row of `current_spans` on its own."""
    module.forward = _by_row(module.forward)


def restart_positions(module: nn.Module) -> None:
    """Change a position table so that positions start again in each row of `current_spans`.

    Its arguments have one dimension of tokens, as has its output (..., tokens, d).
    """
    module.forward = _with_restarts(module.forward)


def _with_restarts(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward_with_restarts(*args: Any, **kwargs: Any) -> Tensor:
        spans = current_spans()
        if spans is None or len(spans.lengths) == 1:
            return forward(*args, **kwargs)
        num_tokens, longest = sum(spans.lengths), max(spans.lengths)
        args = tuple(_first_tokens(value, num_tokens, longest) for value in args)
        kwargs = {key: _first_tokens(item, num_tokens, longest) for key, item in kwargs.items()}
        rows = forward(*args, **kwargs)
        positions = [torch.arange(length, device=rows.device) for length in spans.lengths]
        return rows.index_select(-2, torch.cat(positions))

    return forward_with_restarts


def _first_tokens(value: Any, num_tokens: int, longest: int) -> Any:
    """Return an argument of a position table for the longest row only."""
    if isinstance(value, torch.Size):
        return torch.Size(longest if size == num_tokens else size for size in value)
    if isinstance(value, Tensor) and value.dim() > 0:
        dim = next(
            (dim for dim in (1, 0) if dim < value.dim() and value.shape[dim] == num_tokens), None
        )
        return value if dim is None else value.narrow(dim, 0, longest)
    return value


def _by_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def forward_by_row(*args: Any, **kwargs: Any) -> Any:
        spans = current_spans()
        if spans is None or len(spans.lengths) == 1:
            return forward(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        parts = {name: _split(name, value, spans) for name, value in bound.arguments.items()}
        outputs = []
        for index, length in enumerate(spans.lengths):
            for name, values in parts.items():
                bound.arguments[name] = values[index]
            with use_spans(Spans((length,), spans.kernel)):
                outputs.append(forward(*bound.args, **bound.kwargs))
        return _joined(outputs, spans.lengths)

    return forward_by_row


def _split(name: str, value: Any, spans: Spans) -> Sequence[Any]:
    """Return the part of an argument for each row. Anything but tensors is the same for all."""
    if isinstance(value, _PerRow):
        return value
    if isinstance(value, Mapping):
        by_key = {key: _split(key, item, spans) for key, item in value.items()}
        return [{key: part[i] for key, part in by_key.items()} for i in range(len(spans.lengths))]
    if isinstance(value, tuple | list):
        items = [_split(name, item, spans) for item in value]
        return [type(value)(item[i] for item in items) for i in range(len(spans.lengths))]
    dims = _token_dims(name, value, sum(spans.lengths)) if isinstance(value, Tensor) else ()
    parts = [value] * len(spans.lengths)
    for dim in dims:
        pieces = [part.split(spans.lengths, dim=dim) for part in parts]
        parts = [piece[index] for index, piece in enumerate(pieces)]
    return parts


def _token_dims(name: str, tensor: Tensor, num_tokens: int) -> tuple[int, ...]:
    """Return the dimensions of an argument that are tokens: two of a mask (1, 1, T, T), else one.

    The others are (1, T), (1, T, d), (1, 1, T, d) or (heads, 1, T).
    """
    if "mask" in name and tensor.dim() == 4:
        return tuple(dim for dim in (2, 3) if tensor.shape[dim] == num_tokens)
    candidates = (1, tensor.dim() - 2, tensor.dim() - 1)
    found = [dim for dim in candidates if 0 < dim < tensor.dim()]
    return tuple([dim for dim in found if tensor.shape[dim] == num_tokens][:1])


class _PerRow(list[Any]):
    """Outputs that are no tokens, such as attention weights; another module may get them."""


def _joined(outputs: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Return the outputs of all rows as one."""
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)([_joined(items, lengths) for items in zip(*outputs, strict=True)])
    if all(output is first for output in outputs):
        return first
    tensors: list[Tensor] = [output for output in outputs if isinstance(output, Tensor)]
    rests = {(*tensor.shape[:1], *tensor.shape[2:]) for tensor in tensors}
    lengths_found = [tensor.shape[1] if tensor.dim() > 1 else 0 for tensor in tensors]
    if lengths_found == list(lengths) and len(rests) == 1:
        return torch.cat(tensors, dim=1)
    return _PerRow(outputs)
