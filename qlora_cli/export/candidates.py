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

from qlora_cli.checkpoint.adapter import attach, detach
from qlora_cli.checkpoint.open import open_source
from qlora_cli.data.chat import Example
from qlora_cli.events import Silent
from qlora_cli.export.folder import CONFIG
from qlora_cli.export.judge import Answers, Head, answers
from qlora_cli.export.room import fits
from qlora_cli.export.stream import stream
from qlora_cli.export.tensors import MergedTensors
from qlora_cli.export.underflow import Underflow
from qlora_cli.nn import surgery
from qlora_cli.nn.attention import Kernel
from qlora_cli.nn.quant import Format, QuantLinear
from qlora_cli.nn.surgery import Site
from qlora_cli.weights.build import kernel_on, skeleton
from qlora_cli.weights.built import Built, is_tied
from qlora_cli.weights.load import load
from qlora_cli.weights.locate import read_config
from qlora_cli.weights.source import FolderSource


@dataclass(frozen=True)
class Speaker:
    """A model that can answer. held: in memory whole, not streamed."""

    built: Built
    head: Head
    device: torch.device
    held: bool = False

    def answers(self, rows: Sequence[Example]) -> Answers:
        """To these rows, each on its own."""
        return answers(self.built, self.head, rows, self.device)


def trained(tensors: MergedTensors, base: Path, may_hold: bool) -> Speaker:
    """The model that training ended with; without an adapter in `tensors`, its frozen base.

    may_hold: it is held where it fits; else it is streamed, as merging is bounded in memory.
    """
    kernel = kernel_on(tensors.device, tensors.held.compute)
    built = as_trained(read_config(base / CONFIG), tensors.held, tensors.sites, kernel)
    if may_hold and fits(_held_bytes(tensors), tensors.device):
        load(built, tensors.source, tensors.device, Silent())
        if tensors.adapter is not None:
            attach(built, tensors.adapter)
        return _ready(built, tensors.source, tensors.device, tensors.held.storage, held=True)
    stream(built, tensors.source, tensors.device, tensors.adapter)
    return _ready(built, tensors.source, tensors.device, tensors.held.storage)


def without_adapter(speaker: Speaker, tensors: MergedTensors, base: Path) -> Speaker:
    """The frozen base of a trained model, which gives its adapter away where it is held."""
    if speaker.held:
        detach(speaker.built)
        return speaker
    return trained(replace(tensors, adapter=None), base, may_hold=False)


def as_written(
    tensors: MergedTensors,
    base: Path,
    compute: torch.dtype = torch.float32,
    underflow: Underflow | None = None,
) -> Speaker:
    """The merged model, rounded as it will be written. underflow: counts what it loses by that."""
    built = _transformers_own(base, compute, tensors.dtype, tensors.device)
    stream(built, _Written(tensors, underflow), tensors.device)
    return _ready(built, tensors.source, tensors.device, tensors.dtype)


def in_folder(
    merged: Path, dtype: torch.dtype, device: torch.device, compute: torch.dtype = torch.float32
) -> Speaker:
    """The merged model as it lies in a folder. Raises ModelError where it is not one."""
    built = _transformers_own(merged, compute, dtype, device)
    source = open_source(merged, built.family)
    stream(built, source, device)
    return _ready(built, source, device, dtype)


def as_trained(config: Any, held: Format, sites: Sequence[Site], kernel: Kernel) -> Built:
    """On meta, to be filled."""
    model, family = skeleton(config, held.compute)
    built = Built(model, family, config, list(sites), {}, held, kernel)
    for site in sites:
        packed = QuantLinear(site.in_features, site.out_features, site.bias, held)
        surgery.replace(model, site.path, packed)
    surgery.install_tables(model, family.embeddings, family.head, held)
    return built


def as_others_run_it(
    config: Any, compute: torch.dtype, storage: torch.dtype, kernel: Kernel
) -> Built:
    """On meta, to be filled; with the attention of training."""
    model, family = skeleton(config, compute)
    held = Format(16, compute, storage)
    surgery.install_tables(model, family.embeddings, family.head, held)
    return Built(model, family, config, [], {}, held, kernel)


def _transformers_own(
    folder: Path, compute: torch.dtype, storage: torch.dtype, device: torch.device
) -> Built:
    kernel = kernel_on(device, compute)
    built = as_others_run_it(read_config(folder / CONFIG), compute, storage, kernel)
    model, family = built.model, built.family
    model.set_attn_implementation("sdpa")
    if compute is torch.float16 and device.type == "cpu":
        for path in set(surgery.linear_paths(model)) - {*family.embeddings, family.head}:
            _multiply_in_two_steps(model.get_submodule(path))
    return built


def _multiply_in_two_steps(linear: nn.Module) -> None:
    """A float16 product as cards make it: summed in float32, then rounded (see `float16.py`)."""
    linear.to(torch.float32)
    linear.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    linear.register_forward_hook(lambda _, __, output: output.half())


def _ready(
    built: Built,
    source: FolderSource,
    device: torch.device,
    dtype: torch.dtype,
    held: bool = False,
) -> Speaker:
    built.model.eval()
    built.model.requires_grad_(False)
    path = built.family.token_embedding if is_tied(built) else built.family.head
    return Speaker(built, Head(source.entry(f"{path}.weight"), dtype), device, held)


def _held_bytes(tensors: MergedTensors) -> int:
    """Of the trained model, and of its largest tensor once more while it is packed."""
    packed = {f"{site.path}.weight" for site in tensors.sites}
    total = largest = 0
    for name in tensors.source.names():
        num = torch.Size(tensors.source.shape(name)).numel()
        bits = tensors.held.bits if name in packed else 8 * tensors.held.storage.itemsize
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
        return self.tensors.make(self.tensors.source.file_name(name), self.underflow)
