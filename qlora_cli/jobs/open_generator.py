"""Opens a run or a model with adapters to generate text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.data.template import TEMPLATE_FILE, read_template, with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Observer
from qlora_cli.export.merge.manifest import trained_row_format
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.files.paths import user_path
from qlora_cli.jobs.prompt_format import PromptSource
from qlora_cli.jobs.text_generator import TextGenerator
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.inference import prepare_generation
from qlora_cli.models.switch import BASE, OWN, AdapterSwitch, check_adapter_name
from qlora_cli.proof.prove import require_proof_of_model
from qlora_cli.runs.layout import ADAPTER
from qlora_cli.runs.open import OpenedModel, open_any, open_for_adapters
from qlora_cli.runs.run import Run
from qlora_cli.tasks.classification import CLASSIFICATION, task_of_model

NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})


def open_generator(
    run_or_model: str,
    observer: Observer,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    *,
    uses: Sequence[str] = (),
    merged: bool = False,
) -> TextGenerator:
    """Open a run or a model with its tokenizer, and load adapters for it.

    run_or_model: a run's folder, one of its checkpoints, a model folder, a Hub id or `starter`.
    adapters: name -> folder of an adapter or a run, trained on the base of `run_or_model`.
    uses: names that will be selected. merged: merge the active adapter into the weights.

    A run's own adapter is active until the switch selects another one. Raises InputError if the
    model, an adapter, a name or the tokenizer does not exist, UsageError if `merged` is set and
    there is no adapter.
    """
    check_not_an_adapter(run_or_model)
    check_uses(run_or_model, adapters, uses)
    named = {name: _NamedAdapter.at(user_path(folder)) for name, folder in adapters.items()}
    device = torch.device(inspect_device().kind)
    require_proof_of_model(run_or_model, observer)
    open_model = open_for_adapters if adapters or merged else open_any
    opened = open_model(run_or_model, device, observer)
    if opened.loaded.family.is_classifier:
        raise UsageError(
            f"{run_or_model} is a classifier, which generates no text",
            hint="`qlora generate` gives the label of a prompt, `qlora eval --data` the metrics",
        )
    tokenizer = load_tokenizer(str(opened.folder))
    if tokenizer is None:
        raise ModelError(
            "the model has no tokenizer, so it cannot generate text", where=str(opened.folder)
        )
    source = open_source(opened.weights, opened.loaded.family)
    switch = AdapterSwitch(opened.loaded, source, merged=merged)
    for name, adapter in named.items():
        switch.add(name, adapter.file)
        _note_other_base(name, adapter.run, opened.folder, observer)
    if merged and not switch.adapters:
        raise UsageError("there is no adapter to merge", where="--merged")
    prepare_generation(opened.loaded, device, observer)
    sources = _prompt_sources(tokenizer, opened, named)
    return TextGenerator(opened, switch, tokenizer, device, sources)


@dataclass(frozen=True)
class _NamedAdapter:
    """An adapter of `--adapter`. run: the run that trained it, if its folder is in one."""

    file: AdapterFile
    folder: Path
    run: Run | None

    @classmethod
    def at(cls, folder: Path) -> _NamedAdapter:
        """Return the adapter in the folder of a run, of a checkpoint or of an adapter."""
        run = Run.find(folder)
        if run is not None:
            return cls(run.adapter_file, folder, run)
        return cls(open_adapter(folder), folder, _run_around(folder))

    def prompt_source(self, tokenizer: Any) -> PromptSource | None:
        """Return what the adapter's training states about prompts; None for nothing.

        tokenizer: the base's; it is not changed. A folder without a run states its chat template
        if it contains one.
        """
        if self.run is not None:
            return _source_of(self.run, tokenizer)
        template = self.folder / TEMPLATE_FILE
        if not template.is_file():
            return None
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = read_template(str(template))
        return PromptSource(tokenizer, owner="adapter")


def _run_around(adapter: Path) -> Run | None:
    """Return the run whose folder, or whose checkpoint, contains the folder `adapter`."""
    adapter = adapter.resolve()
    return Run.find(adapter.parent) if adapter.name == ADAPTER else None


def _source_of(run: Run, tokenizer: Any) -> PromptSource:
    return PromptSource(with_template(copy(tokenizer), run.recipe.data), run)


def _prompt_sources(
    tokenizer: Any, opened: OpenedModel, named: Mapping[str, _NamedAdapter]
) -> dict[str, PromptSource]:
    """Return name -> prompt source of the opened run or merge, and of each adapter that has one."""
    if opened.run is None:
        merged_format = trained_row_format(opened.folder)
        own = PromptSource(tokenizer, merged_format=merged_format)
        sources = {BASE: own} if merged_format is not None else {}
    else:
        sources = {OWN: _source_of(opened.run, tokenizer)}
    for name, adapter in named.items():
        source = adapter.prompt_source(tokenizer)
        if source is not None:
            sources[name] = source
    return sources


def check_uses(run_or_model: str, adapters: Mapping[str, Path], uses: Sequence[str]) -> None:
    """Raise UsageError if a name of `uses` is none of the adapters. Loads nothing.

    Arguments as of `open_generator`.
    """
    if not uses:
        return
    run = Run.find(run_or_model)
    own = (OWN,) if run is not None and not run.is_full_fine_tuning else ()
    for name in uses:
        check_adapter_name(name, [BASE, *own, *adapters])


def is_classifier(where: str) -> bool:
    """Return whether `where` is a run of `task: classification` or a classifier's folder.

    where: a run's folder, a model's folder or a hub id. Raises InputError if it is none.
    """
    check_not_an_adapter(where)
    run = Run.find(where)
    if run is not None:
        return bool(run.recipe.task == CLASSIFICATION.name)
    return task_of_model(read_config(find_config(where, None))) is not None


def check_not_an_adapter(where: str) -> None:
    """Raise UsageError if `where` is an adapter's folder without a base, with the way to use it."""
    folder = user_path(where)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    run = _run_around(folder)
    if run is not None:
        kind = "run" if run.step is None else "checkpoint"
        hint = f"name the {kind}'s folder: {folder.parent}"
    else:
        base = open_adapter(folder).config.base_model_name_or_path or "BASE"
        hint = f"name its base, and it as an adapter: `qlora generate {base} --adapter x={where}`"
    raise UsageError(f"{where} is an adapter without its base", hint=hint)


def _note_other_base(name: str, run: Run | None, base: Path, observer: Observer) -> None:
    """Report an adapter of a run that was trained on another base than `base`."""
    trained_on = run.require("base_folder") if run is not None else None
    if trained_on is not None and Path(trained_on) != base.resolve():
        observer.note(f"adapter {name} was trained on {trained_on} and is used here on {base}")
