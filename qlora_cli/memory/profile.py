"""How one device uses memory, derived from its `DeviceProfile`.

This is the only place that combines kernel rules, the allocator model and the treatment of host
memory. The planner, the instrument of a real job, the validation tools and the tests all use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.allocator import CachingAllocator
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.cpu_rules import CPU_RULES
from qlora_cli.memory.cuda_rules import cuda_rules
from qlora_cli.memory.listener import MemoryListener
from qlora_cli.memory.timeline import Timeline
from qlora_cli.memory.tracker import KernelRules, StorageTracker


@dataclass(frozen=True)
class MemoryModel:
    """The memory behaviour of one device.

    rules: memory inside kernels. has_caching_allocator: whether torch's CUDA caching allocator
    provides the memory, so that a storage costs a complete block. has_own_memory: whether the
    device has memory in addition to host memory.
    """

    rules: KernelRules
    has_caching_allocator: bool
    has_own_memory: bool

    @classmethod
    def of(cls, profile: DeviceProfile) -> MemoryModel:
        """Return the memory model of the device that `profile` describes."""
        if profile.kind == "cpu":
            return cls(CPU_RULES, has_caching_allocator=False, has_own_memory=False)
        return cls(cuda_rules(profile), has_caching_allocator=True, has_own_memory=True)

    def new_tracker(self, listener: MemoryListener, device_type: str) -> StorageTracker:
        """Return a tracker that reports the storages on `device_type` to `listener`.

        device_type: `meta` in a dry run, else the type of the device itself, `cpu` or `cuda`.
        """
        counts_host_memory = device_type != "meta" or not self.has_own_memory
        return StorageTracker(listener, self.rules, device_type, counts_host_memory)

    def new_counter(
        self, limit_bytes: int | None = None, timeline: Timeline | None = None
    ) -> Counter:
        """Return a counter of living bytes.

        limit_bytes: reserved bytes above which the allocator model raises OutOfMemory; has no
        effect on a device without a caching allocator. timeline: receives every change.
        """
        allocator = CachingAllocator(limit_bytes) if self.has_caching_allocator else None
        return Counter(allocator, timeline)
