"""Streams a base from its packed copy on disk.

The weights of recomputed blocks, the embedding and the head stay in the files of the packed copy
(`files/packed_store.py`) and are read when they are needed, so that the process does not hold them
in memory. The system's cache of file pages makes
that fast if memory is free. If there is no copy, one is written first: each tensor is read from the
checkpoint, packed and written before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import host_memory, module_scope, scope
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.block_stream import BlockStream, streamed_slots
from qlora_cli.models.placement.device import complete, loading_order
from qlora_cli.models.placement.held import (
    PackedCopy,
    UnmappedCopy,
    held_specs,
    held_tensors,
    put_tensor,
)
from qlora_cli.models.placement.slots import TensorSlot, checked_slots
from qlora_cli.models.placement.weight_store import DiskWeights, on_host
from qlora_cli.nn.packed_tensors import drop_packed


@dataclass(frozen=True)
class DiskPlacement:
    """Placement of a model on `device` whose base is on disk.

    copy: the packed copy, which is written if it is absent. num_streamed: number of first blocks
    whose packed weights are on disk while they do not compute. observer: receives the progress.
    """

    device: torch.device
    copy: PackedCopy
    num_streamed: int
    observer: Observer = field(default_factory=Silent)

    def place(self, loaded: LoadedModel, source: TensorSource) -> None:
        """Load what is not on disk. Raises ModelError if the source does not fit."""
        slots = checked_slots(loaded, source)
        self.observer.stage("load", len(slots))
        heads = loaded.family.classifier.shapes
        order = loading_order(slots, loaded.family.blocks)
        of_base = {name: slots[name] for name in order if name not in heads}
        streamed = streamed_slots(slots, loaded.family.blocks, self.num_streamed)
        on_disk = {name for own in streamed for name in own}
        on_disk |= {name for name, slot in slots.items() if slot.on_host}
        stays = _specs({name: slots[name] for name in on_disk})
        tensors = self.copy.disk_tensors(stays)
        was_absent = tensors is None
        if tensors is None:
            self.copy.write(_specs(of_base), self._packed(of_base, source))
            tensors = self.copy.disk_tensors(stays)
        if tensors is None:
            raise ModelError(
                "the packed copy of the base is damaged although it was just written",
                where="base.residency",
                hint="check the disk of the cache (QLORA_CACHE)",
            )
        for name in on_disk:
            for linear in slots[name].linears:
                drop_packed(linear)
        if self.num_streamed:
            loaded.stream = BlockStream(streamed, self.device, DiskWeights(tensors))
        for name in order:
            if name not in on_disk:
                with scope("temporary"), module_scope(slots[name].module or name):
                    copy = None if name in heads else UnmappedCopy(self.copy)
                    put_tensor(name, slots[name], source, copy, self.device)
        for name, slot in slots.items():
            if slot.table is not None:
                slot.table.disk, slot.table.is_on_disk = tensors.get(name), True
        complete(loaded, source, self.device, is_compared=not was_absent)
        self.observer.advance(len(slots))

    def _held(self, name: str, slot: TensorSlot, source: TensorSource) -> list[tuple[str, Tensor]]:
        """Return name -> tensor in host memory of one slot, which is not filled after this."""
        if slot.table is not None:
            with host_memory():
                return [(name, source.read(name).to(slot.dtype or torch.float32))]
        put_tensor(name, slot, source, None, self.device)
        held = [(key, on_host(t, self.device)) for key, t in held_tensors({name: slot})]
        for linear in slot.linears:
            drop_packed(linear)
        return held

    def _packed(
        self, slots: Mapping[str, TensorSlot], source: TensorSource
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name -> tensor in host memory of a whole base, of which nothing is kept."""
        for done, (name, slot) in enumerate(slots.items(), 1):
            with scope("temporary"), module_scope(slot.module or name):
                held = self._held(name, slot, source)
            while held:
                yield held.pop(0)
            self.observer.advance(done)


def _specs(slots: Mapping[str, TensorSlot]) -> dict[str, TensorSpec]:
    """Return name -> dtype and shape of the tensors of these slots in a copy."""
    return {
        key: spec for name, slot in slots.items() for key, spec in held_specs(name, slot).items()
    }
