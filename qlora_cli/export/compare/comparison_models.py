"""Build the models that are compared: the trained model, its frozen base, and the merged model.

All are built on meta and run one after the other, streamed (`models/placement/streamed.py`): each
module's tensors are in memory only while it computes. Only verification keeps the trained model
resident, if it fits into memory, because it generates tokens one by one.

The trained model computes as it was trained, with this package's linears and attention. The merged
model is transformers' own, with its own attention, because other programs will run it that way.
Only experts are this package's, in 16 bit: transformers' functions for them cannot run on meta. So
is the attention if the run has a prefix, which PEFT would keep in the cache of keys and values. The
merged model computes in float32, so that a comparison shows the rounding of the weights and not the
rounding of the arithmetic. Only its embeddings and head keep the dtype of the file; their rows are
cast when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.peft_prefix import prefix_folder
from qlora_cli.data.encode import Example
from qlora_cli.export.compare.logit_comparison import ComparedLogits, Head, compute_logits
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.underflow import Underflow
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.host import fits
from qlora_cli.models import convert
from qlora_cli.models.attach import attach_adapter, remove_adapter
from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.build import skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.placement.device import DevicePlacement
from qlora_cli.models.placement.streamed import StreamedPlacement
from qlora_cli.models.prefix import attach_prefix
from qlora_cli.models.sites import find_stacks
from qlora_cli.models.tying import share_modules
from qlora_cli.nn import attention
from qlora_cli.nn.attention import kernel_for
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.nn.spans import Kernel
from qlora_cli.tasks.task import Task


@dataclass(frozen=True)
class ComparisonModel:
    """A model on the device that runs it, in evaluation mode.

    task: selects the compared positions.
    loaded: the model.
    head: the place of the head's weight in a file.
    device: runs the model.
    is_resident: True if the complete model is in memory, False if it is streamed.
    """

    task: Task
    loaded: LoadedModel
    head: Head
    device: torch.device
    is_resident: bool = False

    def compared_logits(self, rows: Sequence[Example]) -> ComparedLogits:
        """Return the predictions on these rows, which do not attend to each other."""
        return compute_logits(self.task, self.loaded, self.head, rows, self.device)


def trained_model(tensors: MergedTensors, base: Path, may_be_resident: bool) -> ComparisonModel:
    """Return the trained model: the adapter on the packed base.

    tensors: the merge of the run; without an adapter, the frozen base is returned.
    base: the base's folder, for its config.
    may_be_resident: True to keep the model in memory if it fits; False to stream it always, because
        merging must stay within a bound of memory.
    """
    kernel = kernel_for(profile_of(tensors.device), tensors.base_format.compute)
    config = read_config(base / CONFIG)
    loaded = trained_on_meta(tensors.task, config, tensors.base_format, tensors.sites, kernel)
    if may_be_resident and fits(_resident_bytes(tensors), tensors.device):
        DevicePlacement(tensors.device, copy=tensors.copy).place(loaded, tensors.trained_source)
        if tensors.trained_adapter is not None:
            attach_adapter(loaded, tensors.trained_adapter)
        is_resident = True
    else:
        streamed = StreamedPlacement(tensors.device, tensors.trained_adapter, tensors.copy)
        streamed.place(loaded, tensors.trained_source)
        is_resident = False
    _add_prefix(loaded, tensors.prefix, tensors.device)
    # A classification head trains in float32.
    is_classifier = loaded.family.is_classifier
    storage = torch.float32 if is_classifier else tensors.base_format.storage
    return comparison_model(
        tensors.task, loaded, tensors.source, tensors.device, storage, is_resident
    )


def frozen_base_model(
    trained: ComparisonModel, tensors: MergedTensors, base: Path
) -> ComparisonModel:
    """Return the packed base without the adapter, or with the one that training began with.

    trained: the trained model. If it is resident, its adapter is removed and the same model is
    returned. tensors, base: as in `trained_model`.
    """
    start = tensors.before_training()
    if not trained.is_resident:
        return trained_model(start, base, may_be_resident=False)
    if start.trained_adapter is None:
        remove_adapter(trained.loaded)
    else:
        attach_adapter(trained.loaded, start.trained_adapter)
    return trained


def merged_model(
    tensors: MergedTensors,
    base: Path,
    compute: torch.dtype = torch.float32,
    underflow: Underflow | None = None,
) -> ComparisonModel:
    """Return the merged model with its weights rounded as they will be written.

    tensors: the merge.
    base: the base's folder, for its config.
    compute: dtype that the model computes in.
    underflow: counts the values that become 0 when they are rounded.
    """
    loaded = _transformers_model(tensors.task, base, compute, tensors.dtype, tensors.device)
    StreamedPlacement(tensors.device).place(loaded, _MergedSource(tensors, underflow))
    _add_prefix(loaded, tensors.prefix, tensors.device)
    return comparison_model(tensors.task, loaded, tensors.source, tensors.device, tensors.dtype)


def folder_model(
    task: Task,
    merged: Path,
    dtype: torch.dtype,
    device: torch.device,
    compute: torch.dtype = torch.float32,
) -> ComparisonModel:
    """Return the merged model of a folder.

    merged: the folder. dtype: dtype of its weights. device: runs the model. compute: dtype that the
    model computes in.

    Raises ModelError if the folder is not a complete model.
    """
    loaded = _transformers_model(task, merged, compute, dtype, device)
    source = open_source(merged, loaded.family)
    StreamedPlacement(device).place(loaded, source)
    _add_prefix(loaded, prefix_folder(merged), device)
    return comparison_model(task, loaded, source, device, dtype)


def _add_prefix(loaded: LoadedModel, prefix: Path | None, device: torch.device) -> None:
    """Attach the prefix in a folder, if there is one; only this package's attention has one."""
    if prefix is not None:
        loaded.model.set_attn_implementation(attention.NAME)
        attach_prefix(loaded, prefix, device)


def trained_on_meta(
    task: Task,
    config: Any,
    base_format: BaseFormat,
    sites: Sequence[Site],
    kernel: Kernel,
    wrap: Callable[[QuantLinear, Site], nn.Module] | None = None,
) -> LoadedModel:
    """Return the trained model on meta, without an adapter, ready to receive its weights.

    base_format: how training stored each of the base's linears. sites: these linears. kernel: its
    attention. wrap: as of `replace_linears`.
    """
    model, family = skeleton(config, base_format.compute, task.model_class)
    stacks = find_stacks(model, family)
    loaded = LoadedModel(model, family, config, list(sites), {}, base_format, kernel, stacks)
    convert.replace_linears(model, sites, base_format, wrap)
    share_modules(model, family.shared)
    convert.replace_experts(model, family, stacks, base_format)
    convert.replace_embeddings(model, family, base_format.default)
    if not family.is_classifier:
        convert.replace_head(model, family.head, base_format.default)
    return loaded


def merged_on_meta(
    task: Task, config: Any, compute: torch.dtype, storage: torch.dtype, kernel: Kernel
) -> LoadedModel:
    """Return the merged model on meta, ready to receive its weights.

    compute: dtype that the model computes in. storage: dtype of embeddings and head. kernel: the
    attention of training; transformers' own attention is not set here.
    """
    model, family = skeleton(config, compute, task.model_class)
    plain = WeightFormat(16, compute, storage)
    convert.replace_experts(model, family, find_stacks(model, family), BaseFormat(plain))
    convert.replace_embeddings(model, family, plain)
    if not family.is_classifier:
        convert.replace_head(model, family.head, plain)
    return LoadedModel(model, family, config, [], {}, BaseFormat(plain), kernel)


def _transformers_model(
    task: Task, folder: Path, compute: torch.dtype, storage: torch.dtype, device: torch.device
) -> LoadedModel:
    kernel = kernel_for(profile_of(device), compute)
    loaded = merged_on_meta(task, read_config(folder / CONFIG), compute, storage, kernel)
    model, family = loaded.model, loaded.family
    if family.is_classifier:
        # transformers' masks of encoders do not separate rows that share a sequence.
        loaded.family = replace(family, rows=replace(family.rows, packs=False))
    if not family.rows.own_attention:
        model.set_attn_implementation(family.merged_attention)
    if compute is torch.float16 and device.type == "cpu":
        for path in convert.linear_paths(model):
            _multiply_in_two_steps(model.get_submodule(path))
    return loaded


def _multiply_in_two_steps(linear: nn.Module) -> None:
    """Compute the float16 product of a linear as a GPU does (see `dtype_range.py`).

    The product is accumulated in float32 and then rounded to float16.
    """
    linear.to(torch.float32)
    linear.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    linear.register_forward_hook(lambda _, __, output: output.half())


def comparison_model(
    task: Task,
    loaded: LoadedModel,
    source: FolderSource,
    device: torch.device,
    dtype: torch.dtype,
    is_resident: bool = False,
) -> ComparisonModel:
    """Return a placed model, ready to be compared. dtype: of its head."""
    loaded.model.eval()
    loaded.model.requires_grad_(False)
    path = loaded.family.token_embedding if is_tied(loaded) else loaded.family.head
    bias = None
    name = f"{loaded.family.head}.bias"
    name = name if name in source.names() else loaded.family.tied.get(name, name)
    if name in source.names():
        bias = source.read(name).to(dtype)
    head = Head(source.entry(f"{path}.weight"), dtype, bias, loaded.family.logits)
    return ComparisonModel(task, loaded, head, device, is_resident)


def _resident_bytes(tensors: MergedTensors) -> int:
    """Return the memory of the resident trained model while it is loaded.

    This is the size of the model plus its largest tensor in float32, which exists while it is
    packed.
    """
    formats = {f"{site.path}.weight": tensors.base_format.of(site) for site in tensors.sites}
    total = largest = 0
    for name in tensors.source.names():
        num = torch.Size(tensors.source.shape(name)).numel()
        weight_format = formats.get(name)
        bits = 16 if weight_format is None else weight_format.bits
        storage_bits = 8 * tensors.base_format.storage.itemsize
        total += num * (bits if bits < 16 else storage_bits) // 8
        largest = max(largest, num * torch.float32.itemsize)
    return total + largest


@dataclass(frozen=True)
class _MergedSource:
    """The source of a streamed model whose tensors are computed by merging."""

    tensors: MergedTensors
    underflow: Underflow | None

    def names(self) -> Sequence[str]:
        return self.tensors.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.tensors.compute(self.tensors.source.file_name(name), self.underflow)
