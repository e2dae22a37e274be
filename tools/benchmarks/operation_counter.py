"""Counts the operations of torch that launch a kernel, and the bytes that they read and write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.memory.work import is_free

_WRITES_ONLY = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "bernoulli_", "normal_"})
"""In-place operations that do not read what they overwrite."""


class OperationCounter(TorchDispatchMode):
    """Counts operations and bytes while it is entered, by the name of the operation.

    An operation is one call of aten or of bitsandbytes that launches a kernel: a view or an
    allocation is none. `_foreach` operations and attention count as one, although a GPU may launch
    several kernels. Bytes: every input once, every output once, and a tensor that is updated in
    place twice. Operations on the CPU do not count unless `device_type` is cpu.

    expansions: operation name -> function that computes the same from smaller operations, which
    are counted instead. It is for kernels that call several operations inside.
    """

    def __init__(
        self, device_type: str = "cuda", expansions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self._device_type = device_type
        self._expansions = expansions or {}

    def clear(self) -> None:
        """Forget everything that was counted."""
        self.launches.clear()
        self.num_bytes.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        expansion = self._expansions.get(func._schema.name)
        if expansion is not None:
            with self:
                return expansion(*args, **kwargs)
        output = func(*args, **kwargs)
        if is_free(func):
            return output
        moved = list(_moved(func, args, kwargs, output))
        if any(tensor.device.type == self._device_type for tensor in moved):
            name = func._schema.name.removeprefix("aten::")
            self.launches[name] += 1
            self.num_bytes[name] += sum(map(_bytes, moved))
        return output


def _moved(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Iterator[Tensor]:
    """Yield every tensor that is read or written, once for each time."""
    name = func._schema.name.removeprefix("aten::")
    written: set[int] = set()
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not is_written or not (
            argument.is_out or name in _WRITES_ONLY or _ignores_target(func, args, kwargs)
        )
        for tensor in tensors(value):
            if is_read:
                yield tensor
            if is_written:
                written.add(id(tensor))
                yield tensor
    for tensor in tensors(output):
        if id(tensor) not in written:
            yield tensor


def _ignores_target(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether `addmm_` overwrites its target because its factor `beta` is 0."""
    return func._schema.name == "aten::addmm_" and kwargs.get("beta") == 0


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an argument or an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; repeated elements of an expanded tensor count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
