"""Checkpoints: everything that makes a resumed run bit-identical to an unbroken one.

A checkpoint holds the trained tensors, the optimizer's state, the loss scale, the random states
and the step. The order of rows is a pure function of the step (`data/packing.py`), and so is the
learning rate; neither is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_cli.errors import ModelError, NotFinite, QloraError
from qlora_cli.files.atomic import RESUME_HINT, atomic_folder, report_write_errors
from qlora_cli.files.finite import finite_cpu_copy
from qlora_cli.files.safetensors_io import (
    TensorSpec,
    is_finite,
    read_header,
    read_tensor,
    write_tensors,
)
from qlora_cli.runs.layout import RunFolder

_TENSORS = "trained.safetensors"
_STATE = "state.pt"
_DAMAGE = (ModelError, OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError)
"""What torch.load and the readers raise on files that are missing, cut short or overwritten."""


class Checkpointed(Protocol):
    """An object whose state is part of a checkpoint, for example an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint stores."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state exactly. Raises ValueError if it belongs to other parameters."""


def save_checkpoint(
    run: RunFolder,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: Checkpointed,
    loss_scale: Mapping[str, float],
) -> Path:
    """Writes step's checkpoint, whole or not at all.

    Raises QloraError where the disk refuses, NotFinite where a parameter is NaN or infinite.
    """
    folder = run.checkpoint(step)
    try:
        with (
            report_write_errors("the checkpoint", folder, RESUME_HINT),
            atomic_folder(folder) as beside,
        ):
            write_trained(trainable, beside / _TENSORS)
            state = {
                "step": step,
                "optimizer": optimizer.state_dict(),
                "loss_scale": dict(loss_scale),
                "random": _random_states(),
            }
            # Given a path, torch reports a full disk as a RuntimeError that does not say so.
            with (beside / _STATE).open("wb") as stream:
                torch.save(state, stream)
    except NotFinite as fault:
        raise NotFinite(f"after step {step}: {fault.what}", hint=fault.hint) from fault
    return folder


def load_checkpoint(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: Checkpointed
) -> tuple[int, dict[str, float]]:
    """Fills parameters, optimizer and random states; returns (step, loss scale's state).

    Raises ModelError on damaged files, QloraError where the checkpoint is of another model.
    """
    try:
        read_trained(folder / _TENSORS, trainable)
        device = next(iter(trainable.values())).device
        state: dict[str, Any] = torch.load(folder / _STATE, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        _restore_random_states(state["random"])
        return int(state["step"]), state["loss_scale"]
    except _DAMAGE as fault:
        raise ModelError(
            f"this checkpoint is damaged: {repr(fault)[:200]}",
            where=str(folder),
            hint="remove its folder and --resume goes on from the one before it",
        ) from fault


def write_trained(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Named tensors in their own dtypes, one at a time through the host.

    Raises NotFinite where one has a value that is NaN or infinite.
    """
    shapes = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(file, shapes, lambda name: finite_cpu_copy(name, tensors[name]), {"format": "pt"})


@torch.no_grad()
def read_trained(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """The inverse of `write_trained`, into parameters that are there already.

    Raises ModelError on values that are not finite, which older versions wrote.
    """
    entries, _ = read_header(file)
    stored = {name: entry.shape for name, entry in entries.items()}
    if stored != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise QloraError(
            "the tensors stored are not those that the recipe trains",
            where=str(file),
            hint="the recipe or the base has changed since; start a new run",
        )
    for name, parameter in parameters.items():
        values = read_tensor(entries[name])
        if not is_finite(values):
            raise ModelError(f"{name} is not finite")
        parameter.copy_(values)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
