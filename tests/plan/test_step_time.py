"""The estimated time of a step: its work is that of a real step, and the slowest part decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from plan_cases import Case
from plan_measure import Run, plan_case, profile_of_kind
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.memory.work import Work, work_of
from qlora_cli.plan.step_time import DeviceSpeed, micro_batches

PROFILE = profile_of_kind("cpu")
CASES = [
    Case(family, "tiny", tuple(text.split()), 8192, False)
    for family, text in (
        ("llama", "data.seq_len=64 adapter.targets=all"),
        ("llama", "data.seq_len=64 train.activation_checkpointing=false"),
        ("qwen2", "data.seq_len=64 base.double_quant=false"),
        ("gpt2", "data.seq_len=64 base.bits=16 adapter.method=full"),
        ("llama", "data.seq_len=64 task=preference"),
    )
]
"""Not with 8 bit: a plan assumes outliers, and the number of columns with outliers is not known."""


class WorkCounter(TorchDispatchMode):
    """Counts the work of the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if (work := work_of(func, args, kwargs or {}, output)) is not None:
            self.work.append(work)
        return output


def products(work: list[Work]) -> Counter[tuple[str, int]]:
    """Return how many operations have products, by kind and floating-point operations."""
    return Counter((item.kind, item.flops) for item in work if item.flops)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planned_work_is_that_of_a_real_step(case: Case) -> None:
    batches = micro_batches(plan_case(case, PROFILE).segments)
    planned = [work for batch in batches for part in batch for work in part.work]
    run = Run.of(case, PROFILE)
    state = run.load()
    if state.task.needs_constants:
        run.compute_constants(state)
    run.step(state)
    with WorkCounter() as counted:
        run.step(state)
    assert products(planned) == products(counted.work)
    assert products(planned)


def test_a_product_is_counted_by_its_formula() -> None:
    x, weight, out = torch.empty(5, 8), torch.empty(8, 3), torch.empty(5, 3)
    aten = torch.ops.aten
    expected = Work("product", 2 * 5 * 8 * 3, 4 * (5 * 8 + 8 * 3 + 5 * 3))
    assert work_of(aten.mm.default, (x, weight), {}, x @ weight) == expected
    added = work_of(aten.addmm_.default, (out, x, weight), {}, out)
    assert added is not None
    assert added.flops == expected.flops
    assert work_of(aten.t.default, (weight,), {}, weight.t()) is None
    assert work_of(aten.empty_like.default, (x,), {}, x) is None


def test_causal_attention_is_half_of_the_square() -> None:
    query = torch.empty(1, 2, 10, 4)
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    work = work_of(operation, (query, query, query), {}, query)
    assert work is not None
    assert (work.kind, work.flops) == ("attention", 2 * (2 * 2 * 10 * 10 * 4) // 2)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work("product", 300, 10), 3.0),
        (Work("product", 100, 50), 5.0),
        (Work("dequantize", 0, 50), 2.0),
        (Work("other", 0, 1), 0.5),
    ],
)
def test_the_slowest_of_three_decides(work: Work, seconds: float) -> None:
    speed = DeviceSpeed(100.0, {"other": 10.0, "dequantize": 25.0}, 0.5, "a test", 1.0, "a test")
    assert speed.seconds([work]) == seconds
    assert speed.seconds([work] * 3) == 3 * seconds
