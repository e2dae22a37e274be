"""Runs a model without loading it: each module has its weights only while it computes.

A module with weights of its own reads them in a forward pre-hook and frees them in a forward hook.
A model of any size runs in the memory of its largest tensor and of the activations. One forward
pass reads the whole checkpoint once, so all rows should be in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.adapters.peft_file import AdapterFile, AdapterLayer
from qlora_cli.adapters.peft_stacks import AdapterStack
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import unallocated
from qlora_cli.models import convert
from qlora_cli.models.attach import attach_adapter, load_lora_weights, load_stack_weights
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.held import PackedCopy, UnmappedCopy, put_tensor
from qlora_cli.models.placement.slots import TensorSlot, checked_slots, rebuild_buffers
from qlora_cli.nn.embedding import HostEmbedding, has_own_memory
from qlora_cli.nn.experts import Experts
from qlora_cli.nn.prefix import BlockPrefix
from qlora_cli.nn.quant import QuantLinear

_NamedSlots = Sequence[tuple[str, TensorSlot]]


@dataclass(frozen=True)
class StreamedPlacement:
    """Placement of a model that computes on `device`, in inference only.

    adapter: put on the model and streamed with it. copy: is read in place of the checkpoint, if it
    exists; None reads the checkpoint.
    """

    device: torch.device
    adapter: AdapterFile | None = None
    copy: PackedCopy | None = None

    def place(self, loaded: LoadedModel, source: TensorSource) -> None:
        """Add hooks that read and free weights. Raises ModelError if the source does not fit."""
        rebuild_buffers(loaded, self.device)
        if has_own_memory(self.device):
            # The table stays in host memory; only the rows that are looked up move to the GPU.
            with unallocated():
                table = loaded.family.token_embedding
                convert.move_embedding_to_host(loaded.model, table, self.device)
        slots_by_module: dict[str, list[tuple[str, TensorSlot]]] = defaultdict(list)
        for name, slot in checked_slots(loaded, source).items():
            slots_by_module[_reader(loaded, slot.module or name.rpartition(".")[0])].append(
                (name, slot)
            )
        if self.adapter is not None:
            attach_adapter(loaded, self.adapter)
        layers = self.adapter.layers if self.adapter is not None else {}
        stacks = self.adapter.stacks if self.adapter is not None else {}
        for path, slots in slots_by_module.items():
            module = loaded.model.get_submodule(path)
            # As of `DevicePlacement`: a copy has no classification head.
            is_head = not loaded.family.classifier.shapes.keys().isdisjoint(dict(slots))
            copy = None if is_head else self.copy
            read = self._read_weights(slots, source, copy, layers.get(path))
            module.register_forward_pre_hook(read)
            if isinstance(module, Experts):
                own = {name: stacks.get(f"{path}.{name}") for name in module.stacks}
                module.register_forward_pre_hook(_read_adapters(own, self.device))
            module.register_forward_hook(_free_weights)

    def _read_weights(
        self,
        slots: _NamedSlots,
        source: TensorSource,
        packed: PackedCopy | None,
        layer: AdapterLayer | None,
    ) -> Callable[[nn.Module, Any], None]:
        """Return a forward pre-hook that reads a module's tensors and its adapter's."""
        copy = UnmappedCopy(packed) if packed is not None else None

        def read(module: nn.Module, _: Any) -> None:
            for name, slot in slots:
                put_tensor(name, slot, source, copy, self.device)
            if layer is not None:
                assert isinstance(module, LoraLinear)
                load_lora_weights(module, layer, self.device)

        return read


def _reader(loaded: LoadedModel, path: str) -> str:
    """Return the path of the module whose forward pass reads the tensors of the module at `path`.

    A linear reads its own. Other small modules of a block may be read by their parent without a
    call, such as a convolution's weight, so the block reads them.
    """
    family, module = loaded.family, loaded.model.get_submodule(path)
    if not path.startswith(f"{family.blocks}."):
        # A table that is read as a matrix, such as DeBERTa's relative positions.
        is_read = isinstance(module, nn.Embedding) and path not in family.embeddings
        return path.rpartition(".")[0] if is_read else path
    index, _, within = path.removeprefix(f"{family.blocks}.").partition(".")
    has_own = isinstance(module, QuantLinear | LoraLinear | nn.Linear | Conv1D)
    has_own = has_own or within in family.experts or path in family.shared.values()
    return path if has_own and within not in family.unquantized else f"{family.blocks}.{index}"


def _read_adapters(
    stacks: Mapping[str, AdapterStack | None], device: torch.device
) -> Callable[[nn.Module, Any], None]:
    """Return a forward pre-hook that reads the adapters of experts. stacks: by weight."""

    def read(module: nn.Module, _: Any) -> None:
        for name, source in stacks.items():
            if source is not None:
                adapted = module.get_submodule(name)
                assert isinstance(adapted, LoraStack)
                load_stack_weights(adapted, source, device)

    return read


def _free_weights(module: nn.Module, *_: Any) -> None:
    """Replace the tensors of a module by meta tensors; a forward hook."""
    with unallocated():
        for part in module.modules():
            if isinstance(part, BlockPrefix):
                continue
            if isinstance(part, HostEmbedding):
                part.weight = torch.empty_like(part.weight, device="meta")
            for key, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, key, nn.Parameter(torch.empty_like(parameter, device="meta"), False))
