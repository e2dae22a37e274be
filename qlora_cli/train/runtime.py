"""Sets up the process that trains. This is the only import of accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import UsageError
from qlora_cli.parallel.processes import SINGLE, DistributedProcesses, Processes

_PROJECT = "qlora"
"""Project of all runs in trackers that have projects."""


def join_processes() -> Processes:
    """Join the other processes of the job, if a launcher has started several.

    That is `qlora train --processes` or `accelerate launch`. A process that trains alone gets
    `SINGLE`. Afterwards the current GPU is the one of this process. Raises UsageError if there are
    fewer GPUs than processes on this machine.
    """
    number, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < number:
        raise UsageError(
            f"{number} processes were started, and the number of GPUs here is {gpus}",
            hint="each process needs a GPU of its own; start fewer",
        )
    partial = PartialState(cpu=not torch.cuda.is_available())
    if partial.num_processes == 1:
        return SINGLE
    return DistributedProcesses(partial.local_process_index)


def setup_device(profile: DeviceProfile, seed: int, processes: Processes = SINGLE) -> torch.device:
    """Seed all random number generators and return the device that this process trains on.

    processes: those that the job has joined. Raises UsageError if a launcher started several
    processes of a job that uses one.
    """
    partial = PartialState(cpu=profile.kind == "cpu")
    if partial.num_processes != processes.size:
        raise UsageError(
            f"started as {partial.num_processes} processes",
            hint="only `qlora train` uses several processes; start this command without a launcher",
        )
    set_seed(seed)
    device: torch.device = partial.device
    return device


def make_tracker(name: str, folder: Path) -> Any:
    """Return accelerate's tracker `name`, which is not started yet. The device must be set up.

    folder: of the run. TensorBoard writes to the folder `tensorboard` in it. In the other trackers
    its name is the run's name, and the project is `qlora`.
    """
    tracker = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return tracker(run_name=name, logging_dir=str(folder))
    if name == "mlflow":
        return tracker(experiment_name=_PROJECT, run_name=folder.name)
    return tracker(run_name=_PROJECT, name=folder.name)
