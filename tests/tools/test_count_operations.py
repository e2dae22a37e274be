"""count_operations.py counts what it says, and the table in the documentation is its output."""

from __future__ import annotations

import json
from pathlib import Path

import count_operations
import torch
from operation_counter import OperationCounter


def counted(function: object, **settings: object) -> OperationCounter:
    counter = OperationCounter("cpu", **settings)  # type: ignore[arg-type]
    with counter:
        function()  # type: ignore[operator]
    return counter


def test_launches_and_bytes_of_known_operations() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    out = torch.empty(4, 2)
    found = counted(lambda: a @ b)
    assert found.launches == {"mm": 1}
    assert found.num_bytes == {"mm": 4 * (32 + 16 + 8)}
    # Written twice over, it is read once and written once.
    assert counted(lambda: out.add_(1)).num_bytes == {"add_": 4 * 16}
    assert counted(lambda: out.copy_(torch.empty(4, 2))).num_bytes == {"copy_": 4 * 16}
    assert counted(lambda: torch.mm(a, b, out=out)).num_bytes == {"mm": 4 * 56}
    assert counted(lambda: out.addmm_(a, b)).num_bytes == {"addmm_": 4 * 64}
    assert counted(lambda: out.addmm_(a, b, beta=0)).num_bytes == {"addmm_": 4 * 56}
    lists = [torch.ones(3), torch.ones(5)]
    assert counted(lambda: torch._foreach_copy_(lists, lists)).launches == {"_foreach_copy_": 1}
    # A view, an allocation and an expanded tensor's repetitions move nothing.
    assert not counted(lambda: a.t().view(8, 4).split(2)).launches
    assert not counted(lambda: torch.empty(3)).launches
    row = torch.ones(1, 8).expand(4, 8)
    assert counted(lambda: a * row).num_bytes == {"mul": 4 * (32 + 8 + 32)}


def test_an_operation_can_be_counted_by_its_parts() -> None:
    parts = {"aten::silu": lambda x: x * torch.sigmoid(x)}
    found = counted(lambda: torch.nn.functional.silu(torch.ones(2)), expansions=parts)
    assert found.launches == {"ones": 1, "sigmoid": 1, "mul": 1}


def test_operations_on_another_device_do_not_count() -> None:
    counter = OperationCounter("cuda")
    with counter:
        torch.ones(3) + 1
    assert not counter.launches


def test_counts_of_two_numbers_of_blocks_are_extended() -> None:
    counts = [count_operations.Counter(a=10), count_operations.Counter(a=12, b=1)]
    assert count_operations._extended(counts, 32) == {"block": 3, "rest": 4, "step": 100}


def test_the_table_is_that_of_the_measurement(root: Path) -> None:
    report = json.loads((root / "tools" / "measurements" / "operations.json").read_text())
    page = (root / "docs" / "performance.md").read_text()
    inside = page.partition(count_operations.BEGIN)[2].partition(count_operations.END)[0]
    assert inside.strip() == count_operations.table(report)
    for row in report["rows"]:
        if row["shape"] == "8B":
            ours, peft = row["ours"], row["peft"]
            assert ours["launches"]["block"] <= 0.5 * peft["launches"]["block"]
            assert ours["bytes"]["step"] <= 0.7 * peft["bytes"]["step"]
