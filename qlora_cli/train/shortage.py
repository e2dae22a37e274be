"""What a job changes if a step runs out of memory: its activation policy, then its micro-batches.

First more blocks are recomputed, which changes no bit of a gradient. Then micro-batches are
divided, which rounds the sum of their gradients differently. Every change is recorded in
`run.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qlora_cli.models.model import LoadedModel
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train.progress import Progress

_KEY = "memory_shortages"
"""Key of the list in run.json."""


@dataclass(frozen=True)
class Shortage:
    """A step that ran out of memory, and what has applied since then.

    step: counted from 1. reason: what the memory was needed for. recomputed_blocks: number of
    blocks that are recomputed. parts: number of parts that each micro-batch is divided into.
    """

    step: int
    reason: str
    recomputed_blocks: int
    parts: int


def recorded_shortages(record: Mapping[str, Any]) -> list[Shortage]:
    """Return the shortages in the content of run.json, in order."""
    return [Shortage(**entry) for entry in record.get(_KEY, ())]


def record_shortage(run: RunFolder, shortage: Shortage) -> None:
    """Add a shortage to run.json. Raises QloraError if it cannot be written."""
    record = run.read()
    run.write(record | {_KEY: [*record.get(_KEY, ()), asdict(shortage)]})


def divided_parts(run: RunFolder) -> int:
    """Return the number of parts that each micro-batch of a run has been divided into so far."""
    shortages = recorded_shortages(run.read())
    return shortages[-1].parts if shortages else 1


def reduce_memory(loaded: LoadedModel | None, progress: Progress, is_divisible: bool) -> str | None:
    """Recompute more blocks, else divide micro-batches. Return what changes; None if nothing does.

    loaded: the model; None if its policy may not change. progress: its number of parts is doubled.
    is_divisible: whether more parts make smaller micro-batches.
    """
    if loaded is not None and _recompute_more(loaded):
        number = num_recomputed(loaded)
        return f"{number} blocks are recomputed in the backward pass, which changes no gradient"
    if not is_divisible:
        return None
    progress.parts *= 2
    return f"each micro-batch is divided into {progress.parts} parts, with the same gradient"


def _recompute_more(loaded: LoadedModel) -> bool:
    """Let half of the kept blocks be recomputed from now on. Return False if none is kept."""
    following = loaded.recomputation.policy.next()
    if following is None:
        return False
    loaded.recomputation.policy = following
    return True


def num_recomputed(loaded: LoadedModel) -> int:
    """Return the number of blocks that are recomputed."""
    return loaded.recomputation.policy.num_recomputed
