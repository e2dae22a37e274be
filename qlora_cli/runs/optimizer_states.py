"""The optimizer's states in a checkpoint: complete, or one file per process that had a part.

Both have the same content. The files of the processes are joined when a checkpoint is read, so that
any number of processes can continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from qlora_cli.parallel.processes import Processes

VALUES = frozenset({"exp_avg", "exp_avg_sq", "master", "state1", "state2"})
"""States with one value per value of the parameter."""
_SCALES = frozenset({"absmax1", "absmax2"})
"""States with one value per `SCALE_BLOCK` values of the parameter."""
SCALE_BLOCK = 256
"""Values that share a scale of bitsandbytes' 8-bit states."""
_COMPLETE = "optimizer"
"""Key of the common file whose value has the states of all parameters."""
_NUMBER = "optimizer_parts"
"""Key of the common file whose value is the number of files of processes, in place of the states.
Older versions, which do not join them, then refuse the checkpoint."""


class Checkpointed(Protocol):
    """An object whose state is part of a checkpoint, for example an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint stores, of this process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state exactly. Raises ValueError if it belongs to other parameters."""


def write_states(
    folder: Path | None, optimizer: Checkpointed, processes: Processes
) -> dict[str, Any]:
    """Write the file of this process and return what the checkpoint's common file stores.

    Each process writes its own file, or sends it to the main process if it does not see the folder,
    because it is on another machine. All processes call this together. folder: that of the
    checkpoint, unfinished; None in all but the main process. Raises OSError if the disk is full.
    """
    own = optimizer.state_dict()
    if processes.size == 1:
        return {_COMPLETE: own}
    folder = processes.broadcast(folder)
    assert folder is not None
    is_visible = folder.is_dir()
    if is_visible:
        save(own, _file(folder, processes.rank, processes.size))
    sent = processes.gather(None if is_visible else _on_cpu(own))
    for rank, states in enumerate(sent):
        if states is not None and processes.is_main:
            save(states, _file(folder, rank, processes.size))
    return {_NUMBER: processes.size}


def read_states(folder: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of all parameters of a checkpoint, as an optimizer of one process has them.

    common: the content of the common file. Raises an OSError, KeyError or RuntimeError if a file is
    damaged.
    """
    if _NUMBER not in common:
        complete: dict[str, Any] = common[_COMPLETE]
        return complete
    number = int(common[_NUMBER])
    parts = [
        torch.load(_file(folder, rank, number), map_location="cpu", weights_only=True)
        for rank in range(number)
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for index, state in part["state"].items():
            found.setdefault(index, []).append(state)
    joined = {index: joined_states(found[index]) for index in sorted(found)}
    return {**parts[0], "state": joined}


def save(content: Mapping[str, Any], file: Path) -> None:
    """Write a file of torch. Raises OSError if the disk is full."""
    # Given a path, torch.save reports a full disk as a RuntimeError without the reason.
    with file.open("wb") as stream:
        torch.save(content, stream)


def part_of_state(state: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Return the states of the values [start, end) of a parameter, from those of all its values.

    start: a multiple of `SCALE_BLOCK` if the states have scales.
    """
    part: dict[str, Any] = {}
    for key, value in state.items():
        if key in VALUES:
            part[key] = value.reshape(-1)[start:end].clone()
        elif key in _SCALES:
            part[key] = value[start // SCALE_BLOCK : -(-end // SCALE_BLOCK)].clone()
        else:
            part[key] = value
    return part


def joined_states(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of a parameter from those of its pieces, in their order."""
    return {
        key: torch.cat([part[key].reshape(-1) for part in parts])
        if key in VALUES | _SCALES
        else value
        for key, value in parts[0].items()
    }


def _file(folder: Path, rank: int, size: int) -> Path:
    """Return the file of a process."""
    return folder / f"state-{rank + 1:05d}-of-{size:05d}.pt"


def _on_cpu(tree: Any) -> Any:
    """Return a copy of nested values with the tensors on the CPU.

    A tensor on a GPU would arrive on the GPU of the process that receives it.
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), tree)
