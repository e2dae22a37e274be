"""The models whose answers are compared: trained, without its adapter, and merged.

All are made on meta and answer one after the other, streamed (`stream.py`), so none is ever held.
In a proof the trained one alone is held where it fits, because its greedy tokens come one by one.

The trained model computes as it was trained, with our linears and attention. A merged one is
transformers' own, with its own attention, as other programs will run it; in float32, so that what
is compared is the weights' rounding and not the arithmetic's. Only its tables keep the dtype of the
file and are cast row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.encode import Example
from qlora_cli.export.compare.logit_comparison import ComparedLogits, Head, compared_logits
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.underflow import Underflow
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.host import fits
from qlora_cli.models import convert
from qlora_cli.models.attach import attach_adapter, remove_adapter
from qlora_cli.models.build import skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.placement.device import DevicePlacement
from qlora_cli.models.placement.streamed import StreamedPlacement
from qlora_cli.nn.attention import Kernel, kernel_for
from qlora_cli.nn.quant import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.tasks.task import Task


@dataclass(frozen=True)
class ComparisonModel:
    """A model that can answer. is_resident: the whole model is in memory, not streamed."""

    task: Task
    loaded: LoadedModel
    head: Head
    device: torch.device
    is_resident: bool = False

    def compared_logits(self, rows: Sequence[Example]) -> ComparedLogits:
        """To these rows, each on its own."""
        return compared_logits(self.task, self.loaded, self.head, rows, self.device)


def trained_model(tensors: MergedTensors, base: Path, may_be_resident: bool) -> ComparisonModel:
    """The model that training ended with; without an adapter in `tensors`, its frozen base.

    may_hold: it is held where it fits; else it is streamed, as merging is bounded in memory.
    """
    kernel = kernel_for(profile_of(tensors.device), tensors.weight_format.compute)
    config = read_config(base / CONFIG)
    loaded = trained_on_meta(tensors.task, config, tensors.weight_format, tensors.sites, kernel)
    if may_be_resident and fits(_held_bytes(tensors), tensors.device):
        DevicePlacement(tensors.device).place(loaded, tensors.source)
        if tensors.adapter is not None:
            attach_adapter(loaded, tensors.adapter)
        return _ready(
            tensors.task,
            loaded,
            tensors.source,
            tensors.device,
            tensors.weight_format.storage,
            is_resident=True,
        )
    StreamedPlacement(tensors.device, tensors.adapter).place(loaded, tensors.source)
    return _ready(
        tensors.task, loaded, tensors.source, tensors.device, tensors.weight_format.storage
    )


def frozen_base_model(
    comparison_model: ComparisonModel, tensors: MergedTensors, base: Path
) -> ComparisonModel:
    """The frozen base of a trained model, which gives its adapter away where it is held."""
    if comparison_model.is_resident:
        remove_adapter(comparison_model.loaded)
        return comparison_model
    return trained_model(replace(tensors, adapter=None), base, may_be_resident=False)


def merged_model(
    tensors: MergedTensors,
    base: Path,
    compute: torch.dtype = torch.float32,
    underflow: Underflow | None = None,
) -> ComparisonModel:
    """The merged model, rounded as it will be written. underflow: counts what it loses by that."""
    loaded = _transformers_own(tensors.task, base, compute, tensors.dtype, tensors.device)
    StreamedPlacement(tensors.device).place(loaded, _Written(tensors, underflow))
    return _ready(tensors.task, loaded, tensors.source, tensors.device, tensors.dtype)


def folder_model(
    task: Task,
    merged: Path,
    dtype: torch.dtype,
    device: torch.device,
    compute: torch.dtype = torch.float32,
) -> ComparisonModel:
    """The merged model as it lies in a folder. Raises ModelError where it is not one."""
    loaded = _transformers_own(task, merged, compute, dtype, device)
    source = open_source(merged, loaded.family)
    StreamedPlacement(device).place(loaded, source)
    return _ready(task, loaded, source, device, dtype)


def trained_on_meta(
    task: Task,
    config: Any,
    weight_format: WeightFormat,
    sites: Sequence[Site],
    kernel: Kernel,
) -> LoadedModel:
    """On meta, to be filled."""
    model, family = skeleton(config, weight_format.compute, task.model_class)
    loaded = LoadedModel(model, family, config, list(sites), {}, weight_format, kernel)
    convert.replace_linears(model, sites, weight_format)
    convert.replace_embeddings(model, family.embeddings, weight_format)
    convert.replace_head(model, family.head, weight_format)
    return loaded


def merged_on_meta(
    task: Task, config: Any, compute: torch.dtype, storage: torch.dtype, kernel: Kernel
) -> LoadedModel:
    """On meta, to be filled; with the attention of training."""
    model, family = skeleton(config, compute, task.model_class)
    weight_format = WeightFormat(16, compute, storage)
    convert.replace_embeddings(model, family.embeddings, weight_format)
    convert.replace_head(model, family.head, weight_format)
    return LoadedModel(model, family, config, [], {}, weight_format, kernel)


def _transformers_own(
    task: Task, folder: Path, compute: torch.dtype, storage: torch.dtype, device: torch.device
) -> LoadedModel:
    kernel = kernel_for(profile_of(device), compute)
    loaded = merged_on_meta(task, read_config(folder / CONFIG), compute, storage, kernel)
    model, family = loaded.model, loaded.family
    model.set_attn_implementation("sdpa")
    if compute is torch.float16 and device.type == "cpu":
        for path in set(convert.linear_paths(model)) - {*family.embeddings, family.head}:
            _multiply_in_two_steps(model.get_submodule(path))
    return loaded


def _multiply_in_two_steps(linear: nn.Module) -> None:
    """A float16 product as cards make it: summed in float32, then rounded (see `float16.py`)."""
    linear.to(torch.float32)
    linear.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    linear.register_forward_hook(lambda _, __, output: output.half())


def _ready(
    task: Task,
    loaded: LoadedModel,
    source: FolderSource,
    device: torch.device,
    dtype: torch.dtype,
    is_resident: bool = False,
) -> ComparisonModel:
    loaded.model.eval()
    loaded.model.requires_grad_(False)
    path = loaded.family.token_embedding if is_tied(loaded) else loaded.family.head
    return ComparisonModel(
        task, loaded, Head(source.entry(f"{path}.weight"), dtype), device, is_resident
    )


def _held_bytes(tensors: MergedTensors) -> int:
    """Of the trained model, and of its largest tensor once more while it is packed."""
    packed = {f"{site.path}.weight" for site in tensors.sites}
    total = largest = 0
    for name in tensors.source.names():
        num = torch.Size(tensors.source.shape(name)).numel()
        bits = (
            tensors.weight_format.bits
            if name in packed
            else 8 * tensors.weight_format.storage.itemsize
        )
        total += num * bits // 8
        largest = max(largest, num * torch.float32.itemsize)
    return total + largest


@dataclass(frozen=True)
class _Written:
    """Merged tensors as the source that a model is streamed from."""

    tensors: MergedTensors
    underflow: Underflow | None

    def names(self) -> Sequence[str]:
        return self.tensors.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.tensors.compute(self.tensors.source.file_name(name), self.underflow)
