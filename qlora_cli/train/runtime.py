"""Sets up the process that trains. This is the only import of accelerate."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import UsageError


def setup_device(profile: DeviceProfile, seed: int) -> torch.device:
    """Seed all random number generators and return the device that this process trains on.

    Raises UsageError if a launcher started several processes.
    """
    processes = PartialState(cpu=profile.kind == "cpu")
    if processes.num_processes > 1:
        raise UsageError(
            f"started as {processes.num_processes} processes",
            hint="qlora trains on one device; start it without a launcher",
        )
    set_seed(seed)
    device: torch.device = processes.device
    return device
