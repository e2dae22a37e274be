"""The models whose answers are compared: trained, without its adapter, and merged either way.

They are built one after the other and freed in between; what stays of each is its `Answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.checkpoint.adapter import detach
from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.checkpoint.open import base_folder, open_plain, open_run
from qlora_cli.data.chat import Example
from qlora_cli.events import Silent
from qlora_cli.export.judge import Answers, answers, free_memory
from qlora_cli.export.tensors import MergedTensors
from qlora_cli.memory.device import host_capacity_bytes
from qlora_cli.weights.build import Built

_ROOM = 0.8
"""Share of a memory that a model's weights may take when it is only to answer some rows."""


def place_to_answer(tensors: MergedTensors) -> torch.device | None:
    """Where the merged model fits: the training's device, else the host, else nowhere."""
    num = sum(torch.Size(shape.shape).numel() for shape in tensors.shapes().values())
    if tensors.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(tensors.device)
        if num * tensors.dtype.itemsize < _ROOM * free:
            return tensors.device
    fits = num * torch.float32.itemsize < _ROOM * host_capacity_bytes()
    return torch.device("cpu") if fits else None


def trained_and_frozen(
    run: RunFolder, device: torch.device, rows: Sequence[Example]
) -> tuple[Answers, Answers]:
    """Answers of the trained model, and of its base as training froze it, without the adapter."""
    built = open_run(run, device, Silent())
    trained = _answers(built, rows)
    detach(built)
    frozen = _answers(built, rows)
    del built
    free_memory()
    return trained, frozen


def as_written(
    run: RunFolder, tensors: MergedTensors, place: torch.device, rows: Sequence[Example]
) -> Answers:
    """Answers of the merged model, rounded as it is written; float32 arithmetic on a CPU."""
    compute = "float32" if place.type == "cpu" else str(tensors.dtype).removeprefix("torch.")
    source = _Written(tensors)
    built = open_plain(base_folder(run), lambda *_: source, compute, place, Silent())
    found = _answers(built, rows)
    del built
    free_memory()
    return found


def _answers(built: Built, rows: Sequence[Example]) -> Answers:
    return answers(built.model.get_submodule(built.family.backbone), built.head, rows)


@dataclass(frozen=True)
class _Written:
    """Merged tensors as the source that a model is built from."""

    tensors: MergedTensors

    def names(self) -> Sequence[str]:
        return self.tensors.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.tensors.make(self.tensors.source.file_name(name))
