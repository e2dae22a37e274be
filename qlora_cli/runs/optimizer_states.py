"""The optimizer's states in a checkpoint: complete, or one file per process that had a part.

Both have the same content. The files of the processes are joined when a checkpoint is read, so that
any number of processes can continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    is_visible = _is_visible(folder)
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

    def part(key: str, value: Any) -> Any:
        if key in VALUES:
            return value.reshape(-1)[start:end].clone()
        if key in _SCALES:
            return value[start // SCALE_BLOCK : -(-end // SCALE_BLOCK)].clone()
        return value

    return mapped_state(part, state)


def joined_states(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of a parameter, flat, from those of its pieces in their order."""

    def joined(key: str, value: Any, *others: Any) -> Any:
        if key in VALUES | _SCALES:
            return torch.cat([tensor.reshape(-1) for tensor in (value, *others)])
        return value

    return mapped_state(joined, *parts)


def mapped_state(
    function: Callable[..., Any], state: Mapping[str, Any], *others: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results of `function` for each key and its values in one or several states.

    bitsandbytes nests some of the states of a parameter in a dictionary.
    """
    return {
        key: mapped_state(function, value, *(other[key] for other in others))
        if isinstance(value, dict)
        else function(key, value, *(other[key] for other in others))
        for key, value in state.items()
    }


def _file(folder: Path, rank: int, size: int) -> Path:
    """Return the file of a process."""
    return folder / f"state-{rank + 1:05d}-of-{size:05d}.pt"


def _is_visible(folder: Path) -> bool:
    """Return whether this process sees the folder that the main process has made."""
    return folder.is_dir()


def _on_cpu(tree: Any) -> Any:
    """Return a copy of nested values with the tensors on the CPU.

    A tensor on a GPU would arrive on the GPU of the process that receives it.
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), tree)
