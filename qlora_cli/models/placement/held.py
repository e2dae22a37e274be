"""The tensors that memory holds of a base, put into the model without reading the checkpoint.

A tensor of the checkpoint becomes one or several tensors in memory: a packed weight and its scales,
the linears of all experts of a stack, or one 16-bit tensor. A packed copy contains exactly these. A
checkpoint that bitsandbytes quantized contains those of the linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.files.packed_entry import WEIGHT
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.files.source import FolderSource, TensorSource
from qlora_cli.memory.scopes import host_memory
from qlora_cli.models.placement.slots import TensorSlot
from qlora_cli.nn.embedding import upload
from qlora_cli.nn.packed_tensors import is_in_format, packed_specs, packed_tensors, put_packed
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site

NamedTensors = Callable[[], Iterator[tuple[str, Tensor]]]
"""Returns the names and the tensors of a loaded base."""


class HeldTensors(Protocol):
    """Tensors of a base as memory holds it."""

    def read(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor] | None:
        """Return the tensors of `specs` on the CPU, or on meta in a dry run.

        specs: name -> dtype and shape. None if there is no copy or it is damaged.
        """


class PackedCopy(HeldTensors, Protocol):
    """A copy of a base as memory holds it."""

    def finish(self, tensors: NamedTensors) -> None:
        """Write the copy if it is absent. tensors: all that the model holds of the base."""

    def disk_tensors(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, DiskTensor] | None:
        """Return the tensors of `specs` in the files; none in a dry run. None without a copy."""

    def write(self, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write the copy. Raises QloraError if it cannot be kept.

        specs: name -> dtype and shape. tensors: in the same order, computed one after the other.
        """


@dataclass(frozen=True)
class UnmappedCopy:
    """A packed copy of which nothing is mapped: a mapped norm would keep its whole file mapped."""

    copy: PackedCopy

    def read(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor] | None:
        """Return the tensors of `specs` in memory of their own; None without a usable copy."""
        places = self.copy.disk_tensors(specs)
        if not places:  # A dry run.
            return self.copy.read(specs)
        return {name: place.read() for name, place in places.items()}


def put_tensor(
    name: str,
    slot: TensorSlot,
    source: TensorSource,
    copy: HeldTensors | None,
    device: torch.device,
) -> bool:
    """Put a tensor into the model, from the copy if it has it. Return whether it has.

    name: of the tensor in `source`. slot: its destination. device: of the model's tensors.
    """
    with host_memory():
        held = copy.read(held_specs(name, slot)) if copy is not None else None
        is_copied = held is not None
        if held is None:
            held = _stored(name, slot, source)
    if held is None:
        slot.fill(source, name, device)
        return False
    put_held(name, slot, held if slot.on_host else {k: upload(held[k], device) for k in held})
    return is_copied


def put_held(
    name: str, slot: TensorSlot, tensors: Mapping[str, Tensor], *, counted: bool = True
) -> None:
    """Make tensors that `held_tensors` yielded the model's own. None is copied.

    name, slot: as of `put_tensor`. counted: as of `put_packed`.
    """
    if not slot.linears:
        slot.put(tensors[name])
    for linear, names in zip(slot.linears, _names(name, slot), strict=True):
        own = {key: tensors[names[key]] for key in packed_specs(linear)}
        put_packed(linear, own, counted=counted)


def stored_tensors(
    name: str, linear: QuantLinear, site: Site | None, source: TensorSource
) -> dict[str, Tensor] | None:
    """Return the tensors of a packed linear if the checkpoint stores its weight in this form.

    name: of the weight in `source`. site: of the linear, if it has one. The tensors are on the CPU.
    None if the weight is not quantized, or in another format than `linear`. Raises ModelError if
    they are damaged.
    """
    if not isinstance(source, FolderSource) or (site is not None and site.transposed):
        return None
    stored = source.stored_format(name)
    if stored is None or not is_in_format(linear.weight_format, stored):
        return None
    tensors, specs = source.read_stored(name), packed_specs(linear)
    found = {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    if found != specs:
        raise ModelError(
            f"the quantized tensors of {source.file_name(name)} do not fit its shape",
            where=str(source.entry(name).file),
            hint="the base is damaged; download it again",
        )
    return tensors


def _stored(name: str, slot: TensorSlot, source: TensorSource) -> dict[str, Tensor] | None:
    """Return the tensors of a slot with one linear, by their name in a copy; as above."""
    if len(slot.linears) != 1:
        return None
    (linear,), (names,) = slot.linears, _names(name, slot)
    tensors = stored_tensors(name, linear, slot.site, source)
    return None if tensors is None else {names[key]: t for key, t in tensors.items()}


def held_tensors(slots: Mapping[str, TensorSlot]) -> Iterator[tuple[str, Tensor]]:
    """Yield name -> tensor of everything that the model holds of a frozen base."""
    for name, slot in slots.items():
        if not slot.linears:
            assert slot.get is not None, name
            yield name, slot.get()
        for linear, names in zip(slot.linears, _names(name, slot), strict=True):
            for key, tensor in packed_tensors(linear).items():
                yield names[key], tensor


def held_specs(name: str, slot: TensorSlot) -> dict[str, TensorSpec]:
    """Return name -> dtype and shape of the tensors that memory holds of a checkpoint's tensor."""
    if not slot.linears:
        assert slot.dtype is not None, name
        return {name: TensorSpec(slot.dtype, slot.file_shape)}
    return {
        names[key]: spec
        for linear, names in zip(slot.linears, _names(name, slot), strict=True)
        for key, spec in packed_specs(linear).items()
    }


def _names(name: str, slot: TensorSlot) -> Iterator[dict[str, str]]:
    """Yield for each linear of a slot: name of its tensor in `packed_tensors` -> name in a copy."""
    for number, linear in enumerate(slot.linears):
        prefix = name if len(slot.linears) == 1 else f"{name}.{number}"
        yield {key: prefix if key == WEIGHT else f"{prefix}.{key}" for key in packed_specs(linear)}
