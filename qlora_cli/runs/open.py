"""Opens a trained run or a model for inference: in eval mode, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.adapters.peft_initial import OwnBase
from qlora_cli.adapters.peft_prefix import prefix_folder
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.files.dtype import file_dtype
from qlora_cli.files.locate import find_base, read_config
from qlora_cli.files.source import FolderSource, OverlaidSource
from qlora_cli.memory.device import profile_of
from qlora_cli.models.attach import adapter_layers_for, attach_adapter, remove_adapter
from qlora_cli.models.build import MakeSource, ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.packed_base import packed_store
from qlora_cli.models.prefix import attach_prefix
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run import Run
from qlora_cli.tasks.classification import task_of_model
from qlora_cli.tasks.registry import task_of

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model and where it was read from.

    folder: contains its config and tokenizer.
    weights: contains the weights under the adapter.
    run: the run that was opened, or None for a plain model.
    """

    loaded: LoadedModel
    folder: Path
    weights: Path
    run: Run | None = None


def open_any(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """Open a run or a model as it is.

    where: a run's folder, one of its checkpoints, a model's folder, `starter` or a hub id.

    Raises InputError if it cannot be found, has no trained weights yet or is damaged.
    """
    run = Run.find(where)
    if run is not None:
        return _opened(run, open_run(run, device, observer))
    folder = find_base(where, None)
    return OpenedModel(open_model(folder, device, observer), folder, folder)


def open_for_adapters(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """Open a run or a model so that adapters can be attached to its linear layers.

    A LoRA run is opened as by `open_any`. Any other model gets a 16-bit base as in training with
    base.bits=16. Arguments and errors are those of `open_any`.
    """
    run = Run.find(where)
    if run is None:
        folder = find_base(where, None)
        if prefix_folder(folder) is not None:
            raise UsageError(
                f"{where} has a prefix (adapter.prefix), and takes no other adapter",
                where="--adapter",
                hint="omit it",
            )
        loaded = _open_packed(folder, folder, _compute_on(device, folder), device, observer)
        return OpenedModel(loaded, folder, folder)
    if not run.is_full_fine_tuning:
        return _opened(run, open_run(run, device, observer))
    weights, compute = run.frozen_or_trained_weights, run.recipe.base.compute_dtype
    return _opened(run, _open_packed(run.base_folder, weights, compute, device, observer))


def _opened(run: Run, loaded: LoadedModel) -> OpenedModel:
    return OpenedModel(loaded, run.base_folder, run.frozen_or_trained_weights, run)


def open_run(run: Run, device: torch.device, observer: Observer) -> LoadedModel:
    """Load the model that a run trained: base with adapter, or the model of full fine-tuning.

    The base is quantized as it was in training. If the run is not finished, or a checkpoint of it
    is requested, the weights are those of a checkpoint, which is noted. Raises UsageError if there
    is none, ModelError if files are missing or damaged.
    """
    base = run.base_folder
    if note := run.describe_weights():
        observer.note(note)
    if run.is_full_fine_tuning:
        trained = partial(_folder_source, run.trained_weights)
        return _open(run.recipe, base, trained, device, observer)
    adapter = run.adapter_file
    source = partial(_source_with_head, base, adapter)
    loaded = _open(run.recipe, base, source, device, observer, adapter)
    own = OwnBase.of(adapter, run.recipe.adapter)
    if own is not None:
        loaded.initial = adapter_layers_for(loaded, own.start)
        loaded.is_residual = own.is_residual
    attach_adapter(loaded, adapter if own is None else own.added)
    if adapter.prefix is not None:
        attach_prefix(loaded, adapter.prefix, device)
    return _ready(loaded, base)


def open_model(folder: Path, device: torch.device, observer: Observer) -> LoadedModel:
    """Load a transformers folder without an adapter, with the prefix of a merged run if it has one.

    The compute dtype is float32 on a CPU. On a GPU it is bfloat16, or float16 if the checkpoint is
    in float16 or the GPU does not support bfloat16.
    """
    compute = _compute_on(device, folder)
    loaded = open_plain(folder, partial(_folder_source, folder), compute, device, observer)
    if (prefix := prefix_folder(folder)) is not None:
        attach_prefix(loaded, prefix, device, is_switched=False)
    return loaded


def open_plain(
    base: Path, source: MakeSource, compute: str, device: torch.device, observer: Observer
) -> LoadedModel:
    """Load a model without quantized weights and without an adapter.

    base: the folder of its config.
    source: opens the source of its tensors.
    compute: name of the compute dtype.
    """
    return _open(_sixteen_bit(base, compute, "full"), base, source, device, observer)


def _open_packed(
    base: Path, weights: Path, compute: str, device: torch.device, observer: Observer
) -> LoadedModel:
    """Load a model with a 16-bit base whose linear layers can have adapters, without an adapter."""
    recipe = _sixteen_bit(base, compute, "lora")
    loaded = _open(recipe, base, partial(_folder_source, weights), device, observer)
    # `build` adds the untrained adapter that training starts with.
    remove_adapter(loaded)
    return loaded


def _sixteen_bit(base: Path, compute: str, method: str) -> Recipe:
    """Return the recipe of a 16-bit base for a model that has no recipe."""
    content = {
        "model": {"name": str(base)},
        "base": {"bits": 16, "compute_dtype": compute},
        "adapter": {"method": method},
        "data": {"train": ""},
    }
    if (task := task_of_model(read_config(base / "config.json"))) is not None:
        settings = task.settings.model_dump(mode="json", exclude_unset=True)
        content |= {"task": task.name, "classification": settings}
    return Recipe.model_validate(content)


def _folder_source(folder: Path, _: nn.Module, family: Family) -> FolderSource:
    return open_source(folder, family)


def _source_with_head(
    folder: Path, adapter: AdapterFile, _: nn.Module, family: Family
) -> FolderSource:
    """Return the tensors of a base and those of the classification head in an adapter's folder."""
    source = open_source(folder, family)
    return OverlaidSource(source, adapter.saved) if adapter.saved else source


def _open(
    recipe: Recipe,
    base: Path,
    source: MakeSource,
    device: torch.device,
    observer: Observer,
    adapter: AdapterFile | None = None,
) -> LoadedModel:
    """Load a model for inference. adapter: as of `ModelRequest`."""
    config = read_config(base / "config.json")
    inference = recipe
    if not recipe.base.moves_blocks:
        train = recipe.train.model_copy(update={"activation_checkpointing": False})
        inference = recipe.model_copy(update={"train": train})
    model_class = task_of(recipe).model_class
    profile = profile_of(device)
    copy = packed_store(recipe, base, config, model_class, device.type, observer)
    given = (inference, config, source, device, profile, observer, model_class, copy)
    loaded = build(ModelRequest(*given, adapter=adapter))
    return _ready(loaded, base)


def _ready(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """Set eval mode, the key-value cache and the generation settings in `folder`."""
    from transformers import GenerationConfig

    loaded.model.eval()
    loaded.model.requires_grad_(False)
    loaded.config.use_cache = True
    if (folder / _GENERATION_CONFIG).is_file():
        loaded.model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _compute_on(device: torch.device, folder: Path) -> str:
    """Return the name of the compute dtype for a model without a recipe (see `open_model`)."""
    if device.type == "cpu":
        return "float32"
    config = read_config(folder / "config.json")
    if file_dtype(config) is torch.float16 or torch.cuda.get_device_capability(device) < (8, 0):
        return "float16"
    return "bfloat16"
