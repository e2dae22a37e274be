"""Groups of consecutive blocks that repeat: one block in Llama, a local and a global in Gemma 2.

A dry run records a few groups and repeats them (`recording.py`). Blocks of another kind may come
first, such as the dense blocks of a model with experts; they belong to the first group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qlora_cli.plan.recording import NUM_RECORDED_BLOCKS

_MAX_FIRST = 4
_MAX_PERIOD = 8


@dataclass(frozen=True)
class BlockGroups:
    """The groups of a model with `num_blocks` blocks.

    first: number of blocks before the first repeated one. period: number of blocks of a group. The
    last blocks, if they are no complete group, are a group of their own.
    """

    first: int
    period: int
    num_blocks: int

    @property
    def number(self) -> int:
        """Return the number of complete groups."""
        return (self.num_blocks - self.first) // self.period

    @property
    def num_recorded_blocks(self) -> int:
        """Return the number of blocks of a model with `NUM_RECORDED_BLOCKS` complete groups."""
        rest = (self.num_blocks - self.first) % self.period
        return self.first + NUM_RECORDED_BLOCKS * self.period + rest

    @property
    def middle(self) -> range:
        """Return the blocks of a group that is repeated, or of its neighbour."""
        start = self.first + NUM_RECORDED_BLOCKS // 2 * self.period
        return range(start, start + self.period)

    def group_of(self, block: int) -> int:
        """Return the number of the group of a block."""
        return max(0, (block - self.first) // self.period)


def find_groups(kinds: Sequence[Hashable]) -> BlockGroups | None:
    """Return the groups with which the fewest blocks need to run; None if all need to.

    kinds: what distinguishes each block from others.
    """
    found = [
        BlockGroups(first, period, len(kinds))
        for first in range(_MAX_FIRST)
        for period in range(1, _MAX_PERIOD + 1)
        if all(kinds[index] == kinds[index - period] for index in range(first + period, len(kinds)))
    ]
    shorter = [groups for groups in found if groups.num_recorded_blocks < len(kinds)]
    return min(shorter, key=lambda groups: groups.num_recorded_blocks, default=None)
