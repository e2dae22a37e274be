"""Paged optimizer states: large ones are no part of what the card's allocator hands out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.recipe.schema import Train
from qlora_cli.train.bitsandbytes_adamw import PAGED_FROM
from qlora_cli.train.optimizer import make_optimizer

META = torch.device("meta")


@pytest.mark.parametrize(
    ("optimizer", "num_values", "counted"),
    [
        ("paged_adamw", PAGED_FROM, 0),
        ("paged_adamw", PAGED_FROM - 1, 2 * 4 * (PAGED_FROM - 1)),
        ("paged_adamw8bit", PAGED_FROM, 0),
        ("adamw8bit", PAGED_FROM, 2 * PAGED_FROM),
    ],
)
def test_what_the_allocator_gives_for_the_two_moments(
    optimizer: str, num_values: int, counted: int
) -> None:
    weight = nn.Parameter(torch.empty(num_values, device=META))
    weight.grad = torch.empty(num_values, device=META)
    made = make_optimizer(Train(optimizer=optimizer), [weight], META)  # type: ignore[arg-type]
    counter = Counter()
    tracker = MemoryModel.of(DeviceProfile("cuda", "a GPU", 2**34)).new_tracker(counter, "meta")
    tracker.tag([weight, weight.grad], "adapter")
    before = counter.live_bytes
    with tracker:
        made.apply(1.0, 0.0)
    small_change = 8192  # Maps of codes and the scales of 8-bit blocks.
    assert counted <= counter.live_bytes - before <= counted + small_change
