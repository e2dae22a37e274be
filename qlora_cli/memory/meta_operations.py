"""Runs operations on meta tensors, each only once for the same forms of its arguments.

A meta tensor has no values: the form of an output and the work of an operation depend only on the
forms of the inputs and on the other arguments. torch computes the form in Python for most
operations, which takes 0.1 ms and more, and the blocks of a model repeat the same few hundred
operations many times.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qlora_cli.memory.operations import written_into
from qlora_cli.memory.work import Work, work_of


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Known(NamedTuple):
    """What is known of an operation. form: of its output; None if the operation has to run."""

    form: _Form | None
    work: Work | None


class _NotCached(Exception):
    """An argument is a tensor on another device."""


class MetaOperations:
    """Runs operations, and remembers the forms of their outputs and their work."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Work | None]:
        """Return the output of an operation and its work; None if it has none, such as a view.

        The output is a new tensor of the same form if that is known.
        """
        if func.is_view:
            return func(*args, **kwargs), None
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            known = self._known.get(key)
        except (_NotCached, TypeError):  # Some arguments have no hash.
            output = _run(func, args, kwargs)
            return output, work_of(func, args, kwargs, output)
        if known is None:
            output = _run(func, args, kwargs)
            known = _Known(_new_form(output, args, kwargs), work_of(func, args, kwargs, output))
            self._known[key] = known
        elif known.form is None:
            output = _run(func, args, kwargs)
        else:
            shape, stride, dtype = known.form
            output = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return output, known.work


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    output = written_into(func.name(), args, kwargs)
    return func(*args, **kwargs) if output is None else output


def _key(value: Any) -> Hashable:
    """Return what an output and the work depend on in an argument."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _NotCached
        stride = value.stride()
        # The bytes that are read of an expanded tensor are those of its storage.
        num_bytes = value.untyped_storage().nbytes() if 0 in stride else None
        return value.shape, stride, value.dtype, num_bytes
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    # 1, 1.0 and True are equal, but the dtype of an output differs.
    return type(value), value


def _new_form(output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Form | None:
    """Return the form of an output that is one tensor with a storage of its own; else None.

    Operations that return or change an input always run, and those without an input tensor.
    """
    if not isinstance(output, Tensor) or not output.is_meta:
        return None
    storage = output.untyped_storage()
    leaves = tree_leaves([args, dict(kwargs)])
    inputs = {t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor)}
    fills = storage.nbytes() == output.numel() * output.element_size()
    is_new = bool(inputs) and storage._cdata not in inputs and fills
    return _Form(output.shape, output.stride(), output.dtype) if is_new else None
