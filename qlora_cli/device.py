"""Facts about the device that a job runs on or is planned for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProfile:
    """What choices depend on.

    kind: cpu | cuda. capacity_bytes: memory of the card, or of the machine. capability: CUDA
    compute capability, (8, 9) for an RTX 4090; None on a CPU. multiprocessors: of the card, 0 on
    a CPU. context_bytes: of the capacity, what the CUDA context and others take. imagined: a card
    that is not here, described by hand (`--vram`).
    """

    kind: str
    name: str
    capacity_bytes: int
    capability: tuple[int, int] | None = None
    multiprocessors: int = 0
    context_bytes: int = 0
    imagined: bool = False

    @property
    def usable_bytes(self) -> int:
        """What is left for a job."""
        return max(0, self.capacity_bytes - self.context_bytes)
