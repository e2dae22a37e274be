"""Loads all weights of a model onto one device, one tensor at a time.

At any moment memory contains the weights that are already packed, and one tensor of the checkpoint.
The order of loading is the model's and not the file's, so that a dry run, which has no file, loads
in the same order. A dry run calls the same functions with a source of meta tensors. A packed copy
of an earlier start (`held.py`) makes reading and packing the checkpoint unnecessary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import module_scope, scope
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.placement.block_stream import BlockStream, streamed_slots
from qlora_cli.models.placement.held import PackedCopy, held_tensors, put_tensor
from qlora_cli.models.placement.slots import TensorSlot, checked_slots, rebuild_buffers
from qlora_cli.models.placement.weight_store import HostWeights
from qlora_cli.models.tying import share_tied
from qlora_cli.nn.host_head import HostHead, share_weight
from qlora_cli.nn.packed_tensors import drop_packed


@dataclass(frozen=True)
class DevicePlacement:
    """Placement of a whole model on `device`.

    observer: receives the progress of loading. copy: is read in place of the checkpoint, or written
    if it is absent; None for neither. num_streamed: number of first blocks whose packed weights are
    in host memory while they do not compute.
    """

    device: torch.device
    observer: Observer = field(default_factory=Silent)
    copy: PackedCopy | None = None
    num_streamed: int = 0

    def place(self, loaded: LoadedModel, source: TensorSource) -> None:
        """Load every tensor of the model. Raises ModelError if the source does not fit."""
        slots = checked_slots(loaded, source)
        self.observer.stage("load", len(slots))
        weights = HostWeights(self.device)
        if self.num_streamed:
            streamed = streamed_slots(slots, loaded.family.blocks, self.num_streamed)
            loaded.stream = BlockStream(streamed, self.device, weights)
        moved = loaded.stream.names if loaded.stream is not None else set()
        num_copied = 0
        # A copy has the base only: a classification head is trained, and perhaps in no file.
        heads = loaded.family.classifier.shapes
        for done, name in enumerate(loading_order(slots, loaded.family.blocks), 1):
            with scope("temporary"), module_scope(slots[name].module or name):
                copy = None if name in heads else self.copy
                num_copied += put_tensor(name, slots[name], source, copy, self.device)
                if name in moved:
                    _move(name, slots[name], weights)
            self.observer.advance(done)
        # A copy is written only after the checkpoint's head was compared.
        complete(loaded, source, self.device, is_compared=num_copied == len(slots))
        if self.copy is not None:
            absent = {*heads, *moved}
            of_base = {name: slot for name, slot in slots.items() if name not in absent}
            self.copy.finish(lambda: chain(held_tensors(of_base), weights.held()))


def _move(name: str, slot: TensorSlot, weights: HostWeights) -> None:
    """Move the packed weights of a slot that was just filled to host memory."""
    for key, tensor in held_tensors({name: slot}):
        weights.keep(key, tensor)
    for linear in slot.linears:
        drop_packed(linear)


def complete(
    loaded: LoadedModel, source: TensorSource, device: torch.device, *, is_compared: bool
) -> None:
    """Connect and create what no checkpoint contains, after all slots were filled.

    is_compared: the checkpoint was compared with the config before. Raises ModelError if tied
    tensors are different in it.
    """
    if is_tied(loaded):
        _tie_head(loaded, None if is_compared else source)
    if loaded.stream is not None:
        loaded.stream.allocate_buffers()
    share_tied(loaded.model, loaded.family.tied, source)
    rebuild_buffers(loaded, device)


def loading_order(slots: Mapping[str, TensorSlot], blocks: str) -> list[str]:
    """Return the names in the order of loading: tensors outside the blocks first, largest first.

    blocks: path of the list of blocks, which are loaded in their order. A table that is cast needs
    its size twice for a moment, so it is loaded while memory is almost empty.
    """

    def key(name: str) -> tuple[bool, int]:
        in_block = name.startswith(f"{blocks}.")
        return in_block, 0 if in_block else -math.prod(slots[name].file_shape)

    return sorted(slots, key=key)


def _tie_head(loaded: LoadedModel, source: TensorSource | None) -> None:
    """Use the token table as the weight of the head.

    source: of the weights; None if it was checked before. Raises ModelError if the checkpoint
    contains a head with other values.
    """
    embedding: Any = loaded.model.get_submodule(loaded.family.token_embedding)
    head: Any = loaded.head
    if isinstance(head, HostHead):
        share_weight(head, embedding)
    else:
        head.weight = embedding.weight
    table = embedding.weight
    name = f"{loaded.family.head}.weight"
    if source is None or name not in source.names() or table.is_meta:
        return
    # Compared on the CPU as stored in the file, so that the device does not store the table twice.
    if not torch.equal(source.read(name), source.read(f"{loaded.family.token_embedding}.weight")):
        raise ModelError(
            f"config.json ties {name} to the embedding, but the checkpoint contains other values "
            "for it",
            where="model.name",
            hint='write "tie_word_embeddings": false into config.json if the model has a separate '
            "head",
        )
