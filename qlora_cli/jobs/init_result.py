"""The result of `qlora init`. This module imports no torch, because `ui/` imports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.jobs.results import Result
from qlora_cli.recipe.resolve import Choice


@dataclass(frozen=True)
class InitResult(Result):
    """Result of `qlora init`.

    file: the written recipe. choices: its settings in the order of the file; the reason of a
    setting that the user gave states what was found there. device: the device that was planned for.
    usable_bytes: memory of it that the job may use. peak_bytes, needed_bytes: planned peak of the
    tensors, and memory that the caching allocator reserves (on a CPU the same). rows, updates:
    training rows and optimizer steps. is_estimate: rows were sampled, so `updates` is an estimate.
    """

    file: Path
    choices: tuple[Choice, ...]
    device: str
    usable_bytes: int
    peak_bytes: int
    needed_bytes: int
    rows: int
    updates: int
    is_estimate: bool
