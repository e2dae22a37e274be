"""Writes and reads checkpoints. A resumed run is bit-identical to an uninterrupted one.

A checkpoint contains the trained parameters, the optimizer's state, the loss scale, the states of
the random generators and the step, and the weights in the form in which a run exports them, so that
each checkpoint can be used. The order of rows (`data/packing.py`) and the learning rate are
functions of the step and are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import ModelError, NotFinite, QloraError
from qlora_cli.files.atomic import RESUME_HINT, atomic_folder, report_write_errors
from qlora_cli.files.checksums import damage_of_folder, write_checksums
from qlora_cli.files.finite import finite_cpu_copy
from qlora_cli.files.safetensors_io import (
    TensorSpec,
    is_finite,
    read_header,
    read_tensor,
    write_tensors,
)
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.optimizer_states import Checkpointed, read_states, save, write_states

_TENSORS = "trained.safetensors"
_STATE = "state.pt"
_READ_ERRORS = (ModelError, OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError)
"""The exceptions of torch.load and our readers on missing, truncated or overwritten files."""


def save_checkpoint(
    run: RunFolder,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: Checkpointed,
    loss_scale: Mapping[str, float],
    add_files: Callable[[Path, Path], object] | None = None,
    processes: Processes = SINGLE,
) -> Path:
    """Write the checkpoint of a step atomically and return its folder.

    All processes of a job call this together. Each writes the optimizer's states that it has, and
    the main one everything else.

    step: number of completed optimizer steps.
    trainable: name -> trained parameter.
    optimizer: the object whose state is stored with them.
    loss_scale: the state of the loss scale.
    add_files: writes further files; it is called with the folder and with the file of the
        parameters in it.
    processes: those of the job.

    Raises QloraError if it cannot be written, NotFinite if a parameter is NaN or infinite.
    """
    folder = run.checkpoint(step)
    if not processes.is_main:
        with report_write_errors("the checkpoint", folder, RESUME_HINT):
            write_states(None, optimizer, processes)
        return folder
    try:
        with (
            report_write_errors("the checkpoint", folder, RESUME_HINT),
            atomic_folder(folder) as partial,
        ):
            write_parameters(trainable, partial / _TENSORS)
            state = {
                "step": step,
                **write_states(partial, optimizer, processes),
                "loss_scale": dict(loss_scale),
                "random": _random_states(),
            }
            save(state, partial / _STATE)
            if add_files is not None:
                add_files(partial, partial / _TENSORS)
            write_checksums(partial)
    except NotFinite as fault:
        raise NotFinite(f"after step {step}: {fault.what}", hint=fault.hint) from fault
    return folder


def last_good_step(run: RunFolder, note: Callable[[str], object]) -> int | None:
    """Return the step of the last checkpoint whose files are as they were written.

    Later, damaged checkpoints are renamed. note: receives one line for each of them. Returns None
    if there is no checkpoint. Raises ModelError if all are damaged.
    """
    steps = run.steps()
    good, damaged = None, dict[int, list[str]]()
    for step in reversed(steps):
        damaged[step] = damage_of_folder(run.checkpoint(step))
        if not damaged[step]:
            good = step
            break
    if good is None and steps:
        raise ModelError(
            f"every checkpoint is damaged; in the last one {damaged[steps[-1]][0]}",
            where=str(run.checkpoints),
            hint="start a new run with another output",
        )
    for step in steps:
        if good is not None and step > good:
            aside = run.set_aside(step)
            note(
                f"warning: the checkpoint of step {step:,} is damaged ({damaged[step][0]}); it is "
                f"now {aside}, and the run continues from step {good:,}"
            )
    return good


def load_checkpoint(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: Checkpointed
) -> tuple[int, dict[str, float]]:
    """Restore parameters, optimizer and random generators; return (step, loss scale's state).

    folder: the checkpoint's folder.
    trainable, optimizer: are modified in place.

    Raises ModelError if files are damaged, QloraError if the checkpoint belongs to another model.
    """
    try:
        read_parameters(folder / _TENSORS, trainable)
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(read_states(folder, state))
        _restore_random_states(state["random"])
        return int(state["step"]), state["loss_scale"]
    except _READ_ERRORS as fault:
        raise ModelError(
            f"this checkpoint is damaged: {repr(fault)[:200]}",
            where=str(folder),
            hint="remove its folder; --resume then uses the checkpoint before it",
        ) from fault


def write_parameters(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write named tensors in their own dtypes, with one tensor at a time in CPU memory.

    Raises NotFinite if a value is NaN or infinite, OSError if the disk is full.
    """
    specs = {
        name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    write_tensors(file, specs, lambda name: finite_cpu_copy(name, tensors[name]), {"format": "pt"})


@torch.no_grad()
def read_parameters(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the tensors of a file from `write_parameters` into existing parameters.

    Raises QloraError if names or shapes differ from those of `parameters`, ModelError if a value is
    not finite (older versions wrote such values).
    """
    entries, _ = read_header(file)
    stored = {name: entry.shape for name, entry in entries.items()}
    if stored != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise QloraError(
            "the stored tensors are not those that the recipe trains",
            where=str(file),
            hint="the recipe or the base has changed since; start a new run",
        )
    for name, parameter in parameters.items():
        values = read_tensor(entries[name])
        if not is_finite(values):
            raise ModelError(f"{name} is not finite")
        parameter.copy_(values)


@contextmanager
def add_last_checkpoint_hint(run: RunFolder) -> Iterator[None]:
    """Add the path of the run's last checkpoint to the hint of a NotFinite raised in the block."""
    try:
        yield
    except NotFinite as fault:
        steps = run.steps()
        last = "there is no checkpoint"
        if steps:
            last = f"the last good checkpoint is of step {steps[-1]}: {run.checkpoint(steps[-1])}"
        raise NotFinite(fault.what, where=fault.where, hint=f"{last}; {fault.hint}") from fault


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def remove_old_checkpoints(run: RunFolder, keep: int | None, best: int | None) -> list[int]:
    """Remove all checkpoints except the last `keep` ones and that of step `best`.

    keep: None keeps all. Returns the removed steps.
    """
    steps = run.steps()
    removed = [] if keep is None else [step for step in steps[:-keep] if step != best]
    for step in removed:
        run.remove_checkpoint(step)
    return removed
