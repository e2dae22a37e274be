"""A trained run, or any model's folder, as a model ready to answer: eval mode, no gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qlora_cli.events import Observer
from qlora_cli.files.dtype import file_dtype
from qlora_cli.files.locate import find_base, read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.models.attach import attach_adapter, remove_adapter
from qlora_cli.models.build import MakeSource, ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run
from qlora_cli.tasks.registry import task_of

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class OpenedModel:
    """A model, the folder of its config and tokenizer, and the one of its base's weights."""

    loaded: LoadedModel
    folder: Path
    weights: Path
    run: Run | None = None


def open_any(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """A run's folder, a model's folder, `starter` or a hub id. Raises InputError."""
    run = Run.find(where)
    if run is not None:
        return _opened(run, open_run(run, device, observer))
    folder = find_base(where, None)
    return OpenedModel(open_model(folder, device, observer), folder, folder)


def open_for_adapters(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """The same, with linears that adapters can be put on. Raises InputError.

    A LoRA run is as `open_any` opens it. What has no packed base is held in 16 bit, as training
    with base.bits=16 would hold it.
    """
    run = Run.find(where)
    if run is None:
        folder = find_base(where, None)
        loaded = _open_packed(folder, folder, _compute_on(device, folder), device, observer)
        return OpenedModel(loaded, folder, folder)
    if run.recipe.adapter.method == "lora":
        return _opened(run, open_run(run, device, observer))
    weights, compute = run.frozen_or_trained_weights, run.recipe.base.compute_dtype
    return _opened(run, _open_packed(run.base_folder, weights, compute, device, observer))


def _opened(run: Run, loaded: LoadedModel) -> OpenedModel:
    return OpenedModel(loaded, run.base_folder, run.frozen_or_trained_weights, run)


def open_run(run: Run, device: torch.device, observer: Observer) -> LoadedModel:
    """The base as it was frozen in training and the adapter on it; or the model trained in full.

    Raises UsageError where the run is not finished, ModelError where files are missing or damaged.
    """
    base = run.base_folder
    if run.is_full_fine_tuning:
        trained = partial(_folder_source, run.trained_weights)
        return _open(run.recipe, base, trained, device, observer)
    adapter = run.adapter_file
    loaded = _open(run.recipe, base, partial(_folder_source, base), device, observer)
    attach_adapter(loaded, adapter)
    return _ready(loaded, base)


def open_model(folder: Path, device: torch.device, observer: Observer) -> LoadedModel:
    """A transformers folder as it is, without an adapter.

    Computed in float32 on a CPU and in 16 bit on a card, the file's own where it is 16 bit.
    """
    compute = _compute_on(device, folder)
    return open_plain(folder, partial(_folder_source, folder), compute, device, observer)


def open_plain(
    base: Path, source: MakeSource, compute: str, device: torch.device, observer: Observer
) -> LoadedModel:
    """A model without packed weights and without an adapter, computing in `compute`.

    base: the folder of its config. source: where its tensors come from.
    """
    return _open(_sixteen_bit(base, compute, "full"), base, source, device, observer)


def _open_packed(
    base: Path, weights: Path, compute: str, device: torch.device, observer: Observer
) -> LoadedModel:
    recipe = _sixteen_bit(base, compute, "lora")
    loaded = _open(recipe, base, partial(_folder_source, weights), device, observer)
    # What training would begin with; nothing was trained here.
    remove_adapter(loaded)
    return loaded


def _sixteen_bit(base: Path, compute: str, method: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "base": {"bits": 16, "compute_dtype": compute},
            "adapter": {"method": method},
            "data": {"train": ""},
        }
    )


def _folder_source(folder: Path, _: nn.Module, family: Family) -> FolderSource:
    return open_source(folder, family)


def _open(
    recipe: Recipe, base: Path, source: MakeSource, device: torch.device, observer: Observer
) -> LoadedModel:
    config = read_config(base / "config.json")
    train = recipe.train.model_copy(update={"activation_checkpointing": False})
    quiet = recipe.model_copy(update={"train": train})
    model_class = task_of(recipe).model_class
    profile = profile_of(device)
    loaded = build(ModelRequest(quiet, config, source, device, profile, observer, model_class))
    return _ready(loaded, base)


def _ready(loaded: LoadedModel, folder: Path) -> LoadedModel:
    from transformers import GenerationConfig

    loaded.model.eval()
    loaded.model.requires_grad_(False)
    loaded.model.config.use_cache = True
    if (folder / _GENERATION).is_file():
        loaded.model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _compute_on(device: torch.device, folder: Path) -> str:
    """Of a model that no recipe speaks of."""
    if device.type == "cpu":
        return "float32"
    config = read_config(folder / "config.json")
    if file_dtype(config) is torch.float16 or torch.cuda.get_device_capability(device) < (8, 0):
        return "float16"
    return "bfloat16"
