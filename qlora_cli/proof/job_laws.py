"""The laws of a whole job: the plan equals the run, and the merged checkpoint is W + sBA."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.adapted_modules import adapted_layers, adapted_stacks
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.tracker import track_gradients
from qlora_cli.models.composed import auto_class
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.proof.composition import paths_of_weight, stack_as_matrices, stack_delta
from qlora_cli.proof.small_model import CPU, SmallModel
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from qlora_cli.train.state import build_state, tag_living
from qlora_cli.train.step import train_step

_ROWS = (40, 24)
"""Lengths of the packed rows of a step."""
_PHASES = ("load", "first_step", "step")


def plan(small: SmallModel) -> float:
    """Compare the planned peak of each phase with the measured one, in 4 bit, and return the worst.

    The result is relative to the measured peak. The planned and the measured run have two
    micro-batches and activation checkpointing.
    """
    recipe = small.recipe(4, activation_checkpointing=True)
    profile, batch = profile_of(CPU), small.batch(*_ROWS)
    planned = {
        phase.name: phase.peak_bytes
        for phase in dry_run(recipe, small.config, profile, [batch, batch]).phases
    }
    # A plan is that of a new process, in which no earlier model has created the codebook.
    clear_scale_codebook(CPU)
    instrument = Instrument(CPU, profile)
    with instrument.phase("load"):
        state = build_state(small.request(recipe))
        tag_living(state, instrument.tracker)
    for name in ("first_step", "step"):
        gradients = track_gradients(state.trainable.values(), instrument.tracker)
        with gradients, instrument.phase(name):
            train_step(state, [batch, batch], 1e-3)
    measured = {phase.name: phase.peak_bytes for phase in instrument.phases}
    return max(abs(planned[name] / measured[name] - 1) for name in _PHASES)


def merge(small: SmallModel) -> float:
    """Compare the merged checkpoint, as transformers loads it, with W + sBA and the base.

    Returns infinity if transformers finds missing or unexpected tensors.
    """
    loaded, recipe = small.loaded, small.recipe()
    run = RunFolder(small.folder / "run")
    run.create()
    run.write(
        {
            "recipe": recipe.model_dump(mode="json"),
            "base_folder": str(small.folder),
            "status": "done",
        }
    )
    save_adapter(loaded, recipe, run.adapter)
    out = small.folder / "merged"
    tensors = open_merged_tensors(Run(run.path), "original", torch.float32, CPU)
    write_merged(tensors, small.folder, out, {}, Silent())
    merged = _load(small, out)
    if merged is None:
        return float("inf")
    expected = dict(small.reference.state_dict())
    for path, layer in adapted_layers(loaded.model):
        is_transposed = isinstance(small.reference.get_submodule(path), Conv1D)
        delta = layer.delta()
        for other in paths_of_weight(small, path):
            name = f"{other}.weight"
            expected[name] = expected[name] + (delta.t() if is_transposed else delta)
    for path, stack in adapted_stacks(loaded.model):
        expected[path] = expected[path] + stack_as_matrices(small, path, stack_delta(stack))
    return max(_difference(tensor, expected[name]) for name, tensor in merged.items())


def _load(small: SmallModel, folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a folder as transformers loads them; None if some do not match."""
    model_class = auto_class(small.config, small.task.model_class)
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    problems: list[Any] = [info[key] for key in ("missing_keys", "unexpected_keys")]
    with suppress(KeyError):
        problems.append(info["mismatched_keys"])
    return None if any(problems) else dict(model.state_dict())


def _difference(value: Tensor, expected: Tensor) -> float:
    if not value.numel() or not value.is_floating_point():
        return 0.0
    return (value - expected).abs().max().item() / (expected.abs().max().item() or 1.0)
