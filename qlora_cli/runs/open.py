"""A trained run, or any model's folder, as a model ready to answer: eval mode, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.dtype import file_dtype
from qlora_cli.files.locate import find_base, read_config
from qlora_cli.files.source import FolderSource, TensorSource, fingerprint
from qlora_cli.models.attach import attach, detach
from qlora_cli.models.build import build
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.schema import Recipe, Section
from qlora_cli.runs.layout import RunFolder

MakeSource = Callable[[Any, Family], TensorSource]
"""From the skeleton and its family to the tensors."""

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class OpenedModel:
    """A model, the folder of its config and tokenizer, and the one of its base's weights."""

    loaded: LoadedModel
    folder: Path
    weights: Path


def open_any(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """A run's folder, a model's folder, `starter` or a hub id. Raises InputError."""
    run = RunFolder(Path(where).expanduser())
    if run.run_json.is_file():
        folder = base_folder(run)
        return OpenedModel(open_run(run, device, observer), folder, _weights_of(run))
    folder = find_base(where, None)
    return OpenedModel(open_model(folder, device, observer), folder, folder)


def open_for_adapters(where: str, device: torch.device, observer: Observer) -> OpenedModel:
    """The same, with linears that adapters can be put on. Raises InputError.

    A LoRA run is as `open_any` opens it. What has no packed base is held in 16 bit, as training
    with base.bits=16 would hold it.
    """
    run = RunFolder(Path(where).expanduser())
    if not run.run_json.is_file():
        folder = find_base(where, None)
        loaded = _open_packed(folder, folder, _compute_on(device, folder), device, observer)
        return OpenedModel(loaded, folder, folder)
    recipe = read_recipe(run)
    if recipe.adapter.method == "lora":
        return open_any(where, device, observer)
    folder, weights = base_folder(run), _weights_of(run)
    loaded = _open_packed(folder, weights, recipe.base.compute_dtype, device, observer)
    return OpenedModel(loaded, folder, weights)


def _weights_of(run: RunFolder) -> Path:
    full = read_recipe(run).adapter.method == "full"
    return finished(run, run.weights) if full else base_folder(run)


def open_run(run: RunFolder, device: torch.device, observer: Observer) -> LoadedModel:
    """The base as it was frozen in training and the adapter on it; or the model trained in full.

    Raises UsageError where the run is not finished, ModelError where files are missing or damaged.
    """
    recipe = read_recipe(run)
    base = base_folder(run)
    if recipe.adapter.method == "full":
        trained = partial(_folder_source, _weights_of(run))
        return _open(recipe, base, trained, device, observer)
    adapter = adapter_at(run.path)
    loaded = _open(recipe, base, partial(_folder_source, base), device, observer)
    attach(loaded, adapter)
    return _ready(loaded, base)


def adapter_at(where: Path) -> AdapterFile:
    """The adapter of a run, or of a folder in PEFT's format. Raises InputError."""
    run = RunFolder(where.expanduser())
    if not run.run_json.is_file():
        return open_adapter(run.path)
    if read_recipe(run).adapter.method == "full":
        raise UsageError(
            f"{where} was trained in full; it has no adapter",
            hint="name it as the model itself: `qlora generate RUN`",
        )
    return open_adapter(finished(run, run.adapter))


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
    detach(loaded)
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


def read_recipe(run: RunFolder) -> Recipe:
    """The resolved recipe that the run was trained with."""
    recipe = run.require("recipe")
    try:
        return Recipe.model_validate(_without_defaults(recipe, Recipe))
    except (ValueError, AttributeError) as fault:
        raise UsageError(f"damaged recipe: {fault}", where=str(run.run_json)) from fault


def base_folder(run: RunFolder) -> Path:
    """Where the run's base lies. Raises ModelError where it is gone, or was adapted and changed."""
    folder = Path(run.require("base_folder"))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the base that the run was trained on is not at {folder} any more",
            where=str(run.run_json),
            hint="put it back, or write its new place into run.json as base_folder",
        )
    if read_recipe(run).adapter.method == "lora":
        check_fingerprint(run, run.read(), fingerprint(folder))
    return folder


def check_fingerprint(run: RunFolder, about: Mapping[str, Any], found: str) -> None:
    """Raises ModelError where the base's weights are others than when the run began.

    about: run.json; of an older run it does not tell.
    """
    if about.get("base_fingerprint", found) != found:
        raise ModelError(
            f"the weights in {about['base_folder']} are not those that the run was trained on",
            where=str(run.run_json),
            hint="put those back; an adapter is worth nothing on another base",
        )


def open_source(folder: Path, family: Family) -> FolderSource:
    """A folder's tensors under the family's parameter names. Raises ModelError."""
    return FolderSource(
        folder, prefix=f"{family.backbone}.", head=family.head, ignored=family.ignored
    )


def _folder_source(folder: Path, _: nn.Module, family: Family) -> FolderSource:
    return open_source(folder, family)


def _open(
    recipe: Recipe, base: Path, source: MakeSource, device: torch.device, observer: Observer
) -> LoadedModel:
    config = read_config(base / "config.json")
    train = recipe.train.model_copy(update={"activation_checkpointing": False})
    quiet = recipe.model_copy(update={"train": train})
    loaded = build(quiet, config, source, device, observer, file_dtype(config))
    return _ready(loaded, base)


def _ready(loaded: LoadedModel, folder: Path) -> LoadedModel:
    from transformers import GenerationConfig

    loaded.model.eval()
    loaded.model.requires_grad_(False)
    loaded.model.config.use_cache = True
    if (folder / _GENERATION).is_file():
        loaded.model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def finished(run: RunFolder, folder: Path) -> Path:
    """`folder`, once training has written it. Raises UsageError before."""
    if not folder.is_dir():
        raise UsageError(
            f"{run.path} holds no trained weights yet; its status is {run.read().get('status')}",
            hint="go on with `qlora train --resume`, then try again",
        )
    return folder


def _compute_on(device: torch.device, folder: Path) -> str:
    """Of a model that no recipe speaks of."""
    if device.type == "cpu":
        return "float32"
    config = read_config(folder / "config.json")
    if file_dtype(config) is torch.float16 or torch.cuda.get_device_capability(device) < (8, 0):
        return "float16"
    return "bfloat16"


def _without_defaults(content: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """What differs from the defaults: settings that stand there unasked would be refused again."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        field = section.model_fields.get(key)
        inner = field.annotation if field is not None else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Section):
            kept[key] = _without_defaults(value, inner)
        elif field is None or field.is_required() or value != field.default:
            kept[key] = value
    return kept
