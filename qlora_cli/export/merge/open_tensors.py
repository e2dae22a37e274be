"""Opens the tensors of the merge of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlora_cli.adapters.peft_initial import OwnBase
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer, Silent
from qlora_cli.export.merge.combine import WeightedAdapter, combine, open_other_adapters
from qlora_cli.export.merge.expert_tensors import expert_tensors
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.options import MergeBase
from qlora_cli.files.dtype import file_dtype
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import OverlaidSource
from qlora_cli.models.base_format import BaseFormat, base_format_of
from qlora_cli.models.build import skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.packed_base import packed_store
from qlora_cli.models.sites import find_sites, find_stacks
from qlora_cli.runs.run import Run
from qlora_cli.tasks.registry import task_of

_SILENT = Silent()


def open_merged_tensors(
    run: Run,
    base: MergeBase,
    dtype: torch.dtype,
    device: torch.device,
    weight: float = 1.0,
    others: Sequence[tuple[Path, float]] = (),
    observer: Observer = _SILENT,
) -> MergedTensors:
    """Return the tensors of this run's merge. No tensor is read yet.

    run: a finished run.
    base, dtype, device: as in `MergedTensors`.
    weight: factor of the run's own adapter.
    others: folders of further adapters on the same base, and their factors.
    observer: receives notes about the packed copy of the base.

    Raises InputError if the run, its base or an adapter is incomplete or does not match the
    others.
    """
    recipe = run.recipe
    folder = run.base_folder
    config = read_config(folder / CONFIG)
    base_format = base_format_of(recipe, file_dtype(config))
    task = task_of(recipe)
    model, family = skeleton(config, base_format.compute, task.model_class)
    sites, stacks = find_sites(model, family, config), find_stacks(model, family)
    adapter = own_base = None
    if run.is_full_fine_tuning:
        refused = f"{run.path} is a full fine-tuning; it has no adapter to weight or to combine"
        _refuse_adapters(refused, weight, others)
        folder = run.trained_weights
        # Trained weights are stored in the compute dtype of the training.
        base_format = BaseFormat(replace(base_format.default, storage=base_format.compute))
    else:
        if recipe.adapter.is_initialized or recipe.adapter.prefix:
            init = f"adapter.init: {recipe.adapter.init}"
            setting = "a prefix (adapter.prefix)" if recipe.adapter.prefix else init
            refused = f"{run.path} has {setting}, and its adapter is not weighted or combined"
            _refuse_adapters(refused, weight, others)
        own = WeightedAdapter(run.adapter_file, weight)
        adapter = combine([own, *open_other_adapters(run, others)])
        adapter.check([*sites, *stacks])
        own_base = OwnBase.of(adapter, recipe.adapter)
    source = open_source(folder, family)
    if family.is_classifier:
        source = OverlaidSource(source, {} if adapter is None else adapter.saved)
    experts = expert_tensors(stacks, family)
    copy = packed_store(recipe, run.base_folder, config, task.model_class, device.type, observer)
    how = (base_format, base, dtype, device)
    what = (experts, family.others, copy, task.config_entries(model))
    return MergedTensors(source, task, sites, adapter, *how, *what, own_base=own_base)


def _refuse_adapters(what: str, weight: float, others: Sequence[tuple[Path, float]]) -> None:
    if others or weight != 1.0:
        raise UsageError(
            what,
            where="--with" if others else "--weight",
            hint="leave --weight and --with out",
        )
