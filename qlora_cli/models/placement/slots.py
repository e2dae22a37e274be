"""The tensors that a model needs from a checkpoint, and how each one is put into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.errors import ModelError
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import attribute, host_memory
from qlora_cli.models.buffers import created_buffers, persistent_buffers
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.tying import with_names_in_file
from qlora_cli.nn.embedding import HostEmbedding, upload
from qlora_cli.nn.experts import Experts, StackPart
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site

_ANY = -1
"""A number of rows that the shapes of other tensors decide."""


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a checkpoint and its destination in the model.

    file_shape: shape of the tensor in the file. put: stores the tensor, in the model's orientation,
    in the model. site: the linear whose weight it is. table: the module that has the tensor in host
    memory or on disk. dtype: dtype in the model; None for a weight that is quantized. module: path
    of the module that has the tensor, if the tensor's name is another one. linears: those that
    `put` packs the tensor into. get: returns the tensor that `put` stored, if there are no such
    linears and the base is frozen. The tensor is transposed and cast on the CPU, so that the device
    never stores it twice.
    """

    file_shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    site: Site | None = None
    table: HostEmbedding | HostHead | None = None
    dtype: torch.dtype | None = None
    module: str | None = None
    linears: Sequence[QuantLinear] = ()
    get: Callable[[], Tensor] | None = None

    @property
    def on_host(self) -> bool:
        """Return whether the tensor is not on the device."""
        return self.table is not None

    def fill(self, source: TensorSource, name: str, device: torch.device) -> None:
        """Read the tensor `name` and store it in the model on `device`."""
        with host_memory():
            tensor = source.read(name)
            if self.on_host:
                self.put(tensor)
                return
            if self.site is not None:
                tensor = self.site.from_file(tensor).contiguous()
            tensor = tensor.to(self.dtype or tensor.dtype)
        self.put(upload(tensor, device))


def checked_slots(loaded: LoadedModel, source: TensorSource) -> dict[str, TensorSlot]:
    """Return name -> slot of every tensor that a checkpoint of this model contains.

    The tensor `<path>.weight` belongs to the module at `path`. Raises ModelError if the names or
    shapes of the source's tensors are different.
    """
    slots = with_names_in_file(dict(_slots(loaded)), loaded.family.tied, set(source.names()))
    _check_names(loaded, source.names(), slots)
    for name, slot in slots.items():
        _check_shape(name, source.shape(name), slot.file_shape)
    return slots


def _slots(loaded: LoadedModel) -> Iterator[tuple[str, TensorSlot]]:
    sites = {site.path: site for site in loaded.sites}
    tied_head = loaded.family.head if is_tied(loaded) else None
    inside = tuple(f"{path}." for path, m in loaded.model.named_modules() if isinstance(m, Experts))
    for path, module in loaded.model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, Experts):
            yield from _experts_slots(loaded, path, module)
        if isinstance(module, QuantLinear):
            # A packed linear with an adapter is the adapter's `base`.
            name = path.removesuffix(".base")
            if name != tied_head:
                yield f"{name}.weight", _packed_slot(module, sites.get(name))
            if module.bias is not None:
                yield f"{name}.bias", _parameter_slot(module, "bias", "base")
        elif isinstance(module, HostEmbedding):
            yield f"{path}.weight", _host_slot(module)
        elif isinstance(module, HostHead):
            if path != tied_head:
                yield f"{path}.weight", _host_slot(module)
            if module.bias is not None:
                yield f"{path}.bias", _parameter_slot(module, "bias", "base")
        elif not isinstance(module, LoraLinear) and path != tied_head:
            for key, _ in module.named_parameters(recurse=False):
                if parts := loaded.family.stacks.get(f"{path}.{key}"):
                    yield from _stack_slots(path, module, key, parts)
                    continue
                if row_parts := loaded.family.row_parts.get(f"{path}.{key}"):
                    yield from _row_slots(path, module, key, row_parts)
                    continue
                yield f"{path}.{key}", _parameter_slot(module, key, _category(loaded, path))
            for key in persistent_buffers(module):
                yield f"{path}.{key}", _buffer_slot(module, key)


def _packed_slot(module: QuantLinear, site: Site | None) -> TensorSlot:
    """site: None for a head, which a file stores as (out, in)."""
    shape = (module.out_features, module.in_features) if site is None else site.file_shape
    dtype = module.weight_format.storage if module.weight_format.bits == 16 else None
    return TensorSlot(shape, module.pack, site=site, dtype=dtype, linears=(module,))


def _host_slot(module: HostEmbedding | HostHead) -> TensorSlot:
    old = module.weight
    return TensorSlot(
        tuple(old.shape), module.put, table=module, dtype=old.dtype, get=lambda: module.weight
    )


def _experts_slots(
    loaded: LoadedModel, path: str, module: Experts
) -> Iterator[tuple[str, TensorSlot]]:
    """Yield the slots of packed experts: of whole stacks, or of their parts in a checkpoint."""
    for name, shape in module.stacks.items():
        parts = loaded.family.stacks.get(f"{path}.{name}")
        stack = module.stack(name)
        linears: Any = tuple(stack)
        weight_format = stack.weight_format
        dtype = weight_format.storage if weight_format.bits == 16 else None
        if parts is None:
            put = partial(module.pack_stack, name)
            yield f"{path}.{name}", TensorSlot(shape, put, dtype=dtype, linears=linears)
            continue
        for part, linear in zip(parts, linears, strict=True):
            part_shape = (linear.out_features, linear.in_features)
            slot = TensorSlot(part_shape, linear.pack, dtype=dtype, module=path, linears=(linear,))
            yield part.name, slot


def _stack_slots(
    path: str, module: nn.Module, key: str, parts: Sequence[StackPart]
) -> Iterator[tuple[str, TensorSlot]]:
    """Yield the slots of the parts of a stacked parameter of transformers' own module."""
    old: nn.Parameter = getattr(module, key)
    num_filled = 0

    def put(tensor: Tensor, expert: int, rows: slice) -> None:
        nonlocal num_filled
        if num_filled % len(parts) == 0:
            stack = torch.empty(old.shape, dtype=old.dtype, device=tensor.device)
            attribute([stack], "base")
            setattr(module, key, nn.Parameter(stack, requires_grad=old.requires_grad))
        num_filled += 1
        getattr(module, key).data[expert, rows] = tensor

    half = old.shape[1] // 2
    for part in parts:
        is_whole = part.stop - part.start == 2
        rows = slice(None) if is_whole else slice(part.start * half, part.stop * half)
        shape = (old.shape[1] if is_whole else half, old.shape[2])
        put_part = partial(put, expert=part.expert, rows=rows)
        yield part.name, TensorSlot(shape, put_part, dtype=old.dtype, module=path)


def _row_slots(
    path: str, module: nn.Module, key: str, parts: Sequence[str]
) -> Iterator[tuple[str, TensorSlot]]:
    """Yield the slots of the tensors that are a parameter's rows, in order. They are loaded so."""
    old: nn.Parameter = getattr(module, key)
    num_filled = 0

    def put(tensor: Tensor) -> None:
        nonlocal num_filled
        if num_filled == 0:
            whole = torch.empty(old.shape, dtype=old.dtype, device=tensor.device)
            attribute([whole], "base")
            setattr(module, key, nn.Parameter(whole, requires_grad=old.requires_grad))
        rows = slice(num_filled, num_filled + len(tensor))
        getattr(module, key).data[rows] = tensor
        num_filled = 0 if rows.stop == len(old) else rows.stop

    for part in parts:
        yield part, TensorSlot((_ANY, *old.shape[1:]), put, dtype=old.dtype, module=path)


def _parameter_slot(module: nn.Module, key: str, category: str) -> TensorSlot:
    old: nn.Parameter = getattr(module, key)

    def put(tensor: Tensor) -> None:
        value = tensor.to(old.dtype)
        attribute([value], category)
        setattr(module, key, nn.Parameter(value, requires_grad=old.requires_grad))

    def get() -> Tensor:
        return module.get_parameter(key).detach()

    return TensorSlot(tuple(old.shape), put, dtype=old.dtype, get=get)


def _buffer_slot(module: nn.Module, key: str) -> TensorSlot:
    old = module.get_buffer(key)

    def put(tensor: Tensor) -> None:
        value = tensor.to(old.dtype)
        attribute([value], "base")
        module._buffers[key] = value

    return TensorSlot(tuple(old.shape), put, dtype=old.dtype, get=lambda: module.get_buffer(key))


def _category(loaded: LoadedModel, path: str) -> str:
    if path in loaded.family.embeddings:
        return "embeddings"
    return "head" if path == loaded.family.head else "base"


def _check_names(
    loaded: LoadedModel, names: Iterable[str], slots: Mapping[str, TensorSlot]
) -> None:
    present = set(names)
    missing = sorted(set(slots) - present)
    allowed = {f"{loaded.family.head}.weight"} if is_tied(loaded) else set()
    allowed |= {name for pair in loaded.family.tied.items() for name in pair}
    others = tuple(f"{path}." for path in loaded.family.others)
    kept = {name for name in present if others and name.startswith(others)}
    unexpected = sorted(present - set(slots) - allowed - kept)
    if missing or unexpected:
        groups = [
            f"{word}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ModelError(
            "the checkpoint's tensors do not match its config.json; " + "; ".join(groups),
            where="model.name",
            hint="download the folder again, or check that config.json belongs to this checkpoint",
        )


def _check_shape(name: str, in_file: tuple[int, ...], in_model: tuple[int, ...]) -> None:
    wanted = tuple(in_model)
    if wanted[:1] == (_ANY,):
        in_file, wanted = tuple(in_file)[1:], wanted[1:]
    if tuple(in_file) != wanted:
        raise ModelError(
            f"{name} is {tuple(in_file)} in the checkpoint and {tuple(in_model)} by its config",
            where="model.name",
        )


def rebuild_buffers(loaded: LoadedModel, device: torch.device) -> None:
    """Create the buffers on `device` that no checkpoint contains (rotary frequencies)."""
    buffers = created_buffers(loaded.model) if device.type != "meta" else {}
    for path, value in buffers.items():
        parent, _, name = path.rpartition(".")
        if value is not None:
            loaded.model.get_submodule(parent)._buffers[name] = value.to(device)
    attribute(loaded.model.buffers(), "base")
