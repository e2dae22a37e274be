"""bitsandbytes' AdamW: 8-bit states, gradient scaling, and paged states in the dry run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.recipe.schema import Train
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.bitsandbytes_adamw import PAGED_FROM
from qlora_cli.train.optimizer import make_optimizer
from tests.helpers.optimizers import gradient, parameters, steps_of
from tests.helpers.runs import CPU

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
def test_the_dry_run_counts_states_except_large_paged_ones(
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


def test_adamw8bit_trains_on_a_cpu_with_8_bit_states() -> None:
    trained = parameters()
    before = [p.detach().clone() for p in trained]
    optimizer = make_optimizer(Train(optimizer="adamw8bit"), trained, CPU)
    steps_of(optimizer, trained, 3)
    assert optimizer.state[trained[0]]["state1"].dtype == torch.uint8
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    reference = parameters()
    steps_of(AdamW(reference, 0.0), reference, 3)
    moved = torch.cat(
        [(p - old).detach().flatten() for p, old in zip(trained, before, strict=True)]
    )
    wanted = torch.cat(
        [(p - old).detach().flatten() for p, old in zip(reference, before, strict=True)]
    )
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.99


def test_apply_multiplies_the_gradients() -> None:
    states = []
    for factor, scale in ((1.0, 0.25), (0.25, 1.0)):
        trained = parameters()
        optimizer = make_optimizer(Train(optimizer="adamw8bit"), trained, CPU)
        for parameter in trained:
            parameter.grad = gradient(0, parameter) * scale
        optimizer.apply(factor, 1e-2)
        states.append([(p.detach(), optimizer.state[p]["state1"]) for p in trained])
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
