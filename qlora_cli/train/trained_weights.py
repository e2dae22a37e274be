"""Writes the trained weights: into each checkpoint, and into the run's folder at the end.

They are the adapter in PEFT's format, or a model's folder after full fine-tuning.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from qlora_cli.adapters.registry import method_of
from qlora_cli.files.atomic import (
    RESUME_HINT,
    atomic_folder,
    report_write_errors,
    write_json,
)
from qlora_cli.files.checksums import checksums_of
from qlora_cli.files.source import WEIGHTS_FILE
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.runs.layout import ADAPTER, WEIGHTS, RunFolder
from qlora_cli.runs.resume import write_parameters
from qlora_cli.train.state import State


def write_weights(state: State, base: Path, folder: Path, chat_template: str | None) -> None:
    """Write the trained weights to `folder`, a run's: the adapter, or all weights.

    base: the folder of the base, whose config is copied after full fine-tuning. chat_template: the
    Jinja text that `data.template` sets, which is written next to an adapter. Raises QloraError
    if they cannot be written, NotFinite if a weight is NaN or infinite.
    """
    if method_of(state.recipe.adapter).freezes_base:
        save_adapter(state.loaded, state.recipe, folder / ADAPTER, chat_template)
        return
    weights = folder / WEIGHTS
    with (
        report_write_errors("the trained model", weights, hint=RESUME_HINT),
        atomic_folder(weights) as partial,
    ):
        _write_config(state, base, partial)
        write_parameters(state.trainable, partial / WEIGHTS_FILE)


def add_weights(
    state: State, base: Path, chat_template: str | None, checkpoint: Path, parameters: Path
) -> None:
    """Write the trained weights into a checkpoint's folder that is being written.

    base, chat_template: as of `write_weights`. parameters: the checkpoint's file of all trained
    parameters. After full fine-tuning it contains the complete model, which is then linked and not
    written again.
    """
    if method_of(state.recipe.adapter).freezes_base:
        save_adapter(state.loaded, state.recipe, checkpoint / ADAPTER, chat_template)
        return
    weights = checkpoint / WEIGHTS
    weights.mkdir()
    _write_config(state, base, weights)
    _link(parameters, weights / WEIGHTS_FILE)


def _write_config(state: State, base: Path, folder: Path) -> None:
    """Write the base's config.json to `folder`, with what the task changes in it."""
    entries = state.task.config_entries(state.loaded.model)
    if not entries:
        shutil.copy(base / "config.json", folder)
        return
    content = json.loads((base / "config.json").read_text())
    write_json(folder / "config.json", content | entries)


def copy_weights(checkpoint: Path, folder: Path) -> None:
    """Copy the weights of a checkpoint to `folder`, a run's. Raises QloraError if that fails."""
    for name in (ADAPTER, WEIGHTS):
        if not (checkpoint / name).is_dir():
            continue
        target = folder / name
        with (
            report_write_errors("the trained weights", target, hint=RESUME_HINT),
            atomic_folder(target) as partial,
        ):
            shutil.copytree(checkpoint / name, partial, dirs_exist_ok=True)


def weights_checksums(run: RunFolder) -> dict[str, str]:
    """Return path in the run's folder -> SHA-256 of the files of the exported weights."""
    folders = (run.adapter, run.weights)
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return checksums_of(run.path, files)


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
