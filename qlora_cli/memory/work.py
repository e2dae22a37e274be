"""The work of one operation: its floating-point operations, and the bytes that it reads and writes.

Formulas of matrix products and attention are those of torch's FLOP counter. Attention kernels for
which it has none (on a CPU, and of variable length) are counted as causal attention: half of the
products of queries and keys, and of weights and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

WorkKind = Literal["product", "attention", "dequantize", "other"]


class Work(NamedTuple):
    """Work of one operation. kind: decides which speed of the device limits it.

    flops: floating-point operations of matrix products; 0 for other operations. num_bytes: of all
    tensors that it reads and writes.
    """

    kind: WorkKind
    flops: int
    num_bytes: int
    recomputed: bool = False
    """Whether a recomputed block does it a second time."""

    def times(self, factor: float) -> Work:
        """Return the work of `factor` such operations as one."""
        if factor == 1.0:
            return self
        return self._replace(flops=int(self.flops * factor), num_bytes=int(self.num_bytes * factor))


def work_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Work | None:
    """Return the work of an operation; None if it computes nothing, such as a view."""
    if is_free(func):
        return None
    others = [value for value in kwargs.values() if value is not output]
    num_bytes = sum(map(_bytes, _tensors([args, others, [output]])))
    name = func._schema.name
    if "dequantize" in name:
        return Work("dequantize", 0, num_bytes)
    formula = _formula(func)
    if formula is None:
        return Work("other", 0, num_bytes)
    kind: WorkKind = "attention" if "attention" in name else "product"
    return Work(kind, int(formula(args, kwargs, output)), num_bytes)


@cache
def is_free(func: Any) -> bool:
    """Return whether an operation launches nothing: a view, or memory that is not filled."""
    name = func._schema.name.removeprefix("aten::")
    return bool(func.is_view) or "empty" in name or name in ("_local_scalar_dense", "_unsafe_view")


@cache
def _formula(func: Any) -> Callable[[Any, Any, Any], int] | None:
    """Return a function of (args, kwargs, output), or None if an operation has no products."""
    name = func._schema.name
    packet = func._overloadpacket
    if name.endswith("_") and hasattr(torch.ops.aten, name.removeprefix("aten::")[:-1]):
        packet = getattr(torch.ops.aten, name.removeprefix("aten::")[:-1])
    if name.startswith("bitsandbytes::") and ("matmul" in name or "mm" in name):
        return lambda args, kwargs, output: _int8_flops(args)
    if "attention" in name and packet not in flop_registry:
        return _causal_backward if "backward" in name else _causal_forward
    known = flop_registry.get(packet)
    if known is None:
        return None
    if "attention" in name:  # The whole square is counted; this package's attention is causal.
        return lambda args, kwargs, output: known(*args, **kwargs, out_val=output) // 2
    return lambda args, kwargs, output: known(*args, **kwargs, out_val=output)


def _int8_flops(args: tuple[Any, ...]) -> int:
    x, weight = (arg for arg in args[:2] if isinstance(arg, Tensor))
    return 2 * x.numel() * weight.shape[0]


def _causal_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int:
    return _causal_flops([arg for arg in args if isinstance(arg, Tensor)][:3], passes=2)


def _causal_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int:
    # The first tensor is the gradient. The scores are computed again.
    return _causal_flops([arg for arg in args if isinstance(arg, Tensor)][1:4], passes=5)


def _causal_flops(tensors: list[Tensor], passes: int) -> int:
    """Return the operations of `passes` products over half of all (query, key) pairs."""
    query, key, _ = tensors
    if query.dim() == 3:  # Rows of variable length: (tokens, heads, size), as one row.
        length, heads, size = query.shape
        return passes * length * key.shape[0] * heads * size
    batch, heads, length, size = query.shape
    return passes * batch * heads * length * key.shape[2] * size


def _tensors(items: Iterable[Any]) -> Iterable[Tensor]:
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple) or type(item).__name__ == "dict_values":
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; repeated elements of an expanded tensor count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
