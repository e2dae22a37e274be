"""Process and device: the only import of accelerate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import UsageError


@dataclass(frozen=True)
class Runtime:
    """Where this process computes."""

    device: torch.device


def start(facts: DeviceProfile, seed: int) -> Runtime:
    """Settles device and random seed. Raises UsageError under a launcher of several processes."""
    processes = PartialState(cpu=facts.kind == "cpu")
    if processes.num_processes > 1:
        raise UsageError(
            f"started as {processes.num_processes} processes",
            hint="qlora trains on one device; start it without a launcher",
        )
    set_seed(seed)
    return Runtime(processes.device)
