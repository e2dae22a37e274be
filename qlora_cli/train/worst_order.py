"""The worst order in which a file can hold its tensors; a plan knows no other.

Loading peaks highest when the tensor of which most is on the device only while it is taken in comes
last, when all else is there. Which one that is depends on formats, kernels and shapes, so loading
is rehearsed on imagined tensors and each tensor is watched.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from qlora_cli.events import Silent
from qlora_cli.families.spec import Family
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.cuda_rules import rules_for
from qlora_cli.memory.tracker import StorageTracker
from qlora_cli.nn.quant import forget_codes
from qlora_cli.recipe.resolve import DeviceFacts
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.state import build_state
from qlora_cli.weights.source import ImaginedSource


def worst_order(
    recipe: Recipe, config: Any, facts: DeviceFacts, dtype: torch.dtype
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint, in the order that needs most memory.

    dtype: of the file. Raises as loading would.
    """
    watch = _Watch()
    shapes: dict[str, tuple[int, ...]] = {}

    def source(model: nn.Module, family: Family) -> ImaginedSource:
        shapes.update((name, tuple(p.shape)) for name, p in model.named_parameters())
        if getattr(config, "tie_word_embeddings", False):
            shapes.pop(f"{family.head}.weight", None)
        return ImaginedSource(shapes, dtype)

    meta, on_host = torch.device("meta"), facts.kind != "cuda"
    forget_codes(meta)
    with StorageTracker(watch.counter, rules_for(facts), "meta", counts_host=on_host):
        # A copy, because making a model writes the compute dtype into its config.
        build_state(recipe, deepcopy(config), source, meta, watch, dtype)
    passing = dict(zip(shapes, watch.passing, strict=True))
    return dict(sorted(shapes.items(), key=lambda item: passing[item[0]]))


class _Watch(Silent):
    """passing: what each tensor held while it was taken in, beside what stayed of it, in bytes."""

    def __init__(self) -> None:
        self.counter = Counter()
        self.passing: list[int] = []

    def stage(self, name: str, total: int) -> None:
        """Loading begins."""
        self.counter.high_bytes = self.counter.live_bytes

    def advance(self, done: int) -> None:
        """One more tensor is in its place."""
        self.passing.append(self.counter.high_bytes - self.counter.live_bytes)
        self.counter.high_bytes = self.counter.live_bytes
