"""One memory model per device: kernel rules, allocator and host memory follow from its profile."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.allocator import OutOfMemory
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.scopes import host_memory
from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.units import GIB, MIB

CPU = DeviceProfile("cpu", "a CPU", 24 * GIB)
ADA = DeviceProfile("cuda", "a GPU", 24 * GIB, (8, 9), 128)
HOPPER = DeviceProfile("cuda", "a newer GPU", 80 * GIB, (9, 0), 132)


def test_a_gpu_counts_complete_blocks_and_a_cpu_counts_bytes() -> None:
    for profile, counted in ((CPU, 3), (ADA, 512)):
        counter = MemoryModel.of(profile).new_counter()
        counter.allocate("key", 3, "base")
        assert counter.live_bytes == counted


def test_only_a_gpu_has_a_limit() -> None:
    MemoryModel.of(CPU).new_counter(limit_bytes=MIB).allocate("key", GIB, "base")
    with pytest.raises(OutOfMemory):
        MemoryModel.of(ADA).new_counter(limit_bytes=MIB).allocate("key", GIB, "base")


@pytest.mark.parametrize(("profile", "counted"), [(CPU, 400), (ADA, 0)])
def test_host_memory_counts_only_in_a_plan_for_a_cpu(profile: DeviceProfile, counted: int) -> None:
    model = MemoryModel.of(profile)
    counter = model.new_counter()
    with model.new_tracker(counter, "meta"), host_memory():
        tensor = torch.empty(100, device="meta")
    assert counter.live_bytes == counted
    del tensor


def test_the_workspace_of_matrix_products_depends_on_the_gpu() -> None:
    sizes = [MemoryModel.of(profile).rules.workspace_bytes for profile in (CPU, ADA, HOPPER)]
    assert sizes[0] == 0 < sizes[1] < sizes[2]


def test_a_matrix_product_on_the_cpu_needs_no_workspace_on_the_gpu() -> None:
    """Building a model multiplies small matrices on the CPU to check replaced modules."""
    model = MemoryModel.of(ADA)
    counter = model.new_counter()
    with model.new_tracker(counter, "meta"):
        torch.ones(2, 2) @ torch.ones(2, 2)
        assert counter.live_bytes == 0
        product = torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")
    assert counter.live_bytes > model.rules.workspace_bytes
    del product


class Order(Counter):
    """A counter that keeps the sizes in the order in which they come (+) and go (-)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._of_key: dict[Hashable, int] = {}

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        super().allocate(key, num_bytes, category, origin)
        self._of_key[key] = num_bytes
        self.sizes.append(num_bytes)

    def free(self, key: Hashable) -> None:
        super().free(key)
        self.sizes.append(-self._of_key[key])


def test_the_order_of_allocations_is_that_of_a_kernel() -> None:
    """Another order leaves other gaps in the allocator's segments: once 4 % of reserved bytes."""
    order = Order()
    rules = KernelRules({"aten::mm": lambda *_: (100, 200)}, workspace_bytes=4096)
    with StorageTracker(order, rules, "meta") as tracker:
        left = torch.ones(2, 2, device="meta")
        tracker.tag([left], "base")
        product = left @ left
    assert order.sizes == [16, 16, 4096, 100, 200, -200, -100]
    del product
