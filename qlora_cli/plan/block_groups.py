"""Groups of consecutive blocks that repeat: one block in Llama, a local and a global in Gemma 2.

A dry run records a few groups and repeats them (`repeat.py`). Blocks of another kind may come
first, such as the dense blocks of a model with experts; they belong to the first group. If the
first groups are recomputed in the backward pass and the others kept, groups of both kinds are
recorded.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

NUM_RECORDED_GROUPS = 4
"""Groups of a dry run: the first, the last, one to repeat, and its neighbour to compare it with."""
_OF_EACH_KIND = 3
"""Groups of each kind, if there are recomputed and kept ones: the first or last of all groups, one
to repeat, and its neighbour."""
_MAX_FIRST = 4
_MAX_PERIOD = 8


@dataclass(frozen=True)
class GroupSample:
    """The groups that are recorded.

    number: of groups. recomputed: number of first groups that are recomputed in the backward pass.
    repeats: (number of a recorded group, number of copies that are added), in the order in which
    they are added.
    """

    number: int
    recomputed: int
    repeats: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlockGroups:
    """The groups of a model with `num_blocks` blocks.

    first: number of blocks before the first repeated one. period: number of blocks of a group. The
    last blocks, if they are no complete group, are a group of their own. is_sharded: recomputed
    blocks are sharded (`sharded_parameters.py`). Then a recomputed block adds up the gradients of
    the recomputed block after it, so the last one differs from the others. An update has events of
    kept blocks only, so the first kept one differs, too. One more group of each kind is recorded.
    """

    first: int
    period: int
    num_blocks: int
    is_sharded: bool = False

    @property
    def number(self) -> int:
        """Return the number of complete groups."""
        return (self.num_blocks - self.first) // self.period

    @property
    def num_recorded_blocks(self) -> int:
        """Return the number of blocks of a model with `NUM_RECORDED_GROUPS` complete groups."""
        return self.blocks_of(NUM_RECORDED_GROUPS)

    def blocks_of(self, num_groups: int) -> int:
        """Return the number of blocks of a model with this number of complete groups."""
        rest = (self.num_blocks - self.first) % self.period
        return self.first + num_groups * self.period + rest

    def first_blocks(self, num_groups: int, of_groups: int) -> int:
        """Return the number of blocks of the first groups in a model of `of_groups` groups."""
        if num_groups == of_groups:
            return self.blocks_of(num_groups)
        return self.first + num_groups * self.period if num_groups else 0

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the numbers of first blocks that can be recomputed as whole groups, ascending."""
        inner = (self.first + number * self.period for number in range(1, self.number))
        return (0, *inner, self.num_blocks)

    def sample(self, num_recomputed: int) -> GroupSample | None:
        """Return the groups to record if the first `num_recomputed` blocks are recomputed.

        None if the number is not that of whole groups.
        """
        if num_recomputed in (0, self.num_blocks):
            number = min(NUM_RECORDED_GROUPS + self.is_sharded, self.number)
            repeats = _additions((1, self.number - number))
            return GroupSample(number, number if num_recomputed else 0, repeats)
        number, rest = divmod(num_recomputed - self.first, self.period)
        if rest or not 0 < number < self.number:
            return None
        of_each = _OF_EACH_KIND + self.is_sharded
        recomputed, kept = (min(of_each, n) for n in (number, self.number - number))
        added = (number - recomputed, self.number - number - kept)
        # From the last one, so that the first addition does not move the second.
        repeats = _additions((recomputed + self.is_sharded, added[1]), (1, added[0]))
        return GroupSample(recomputed + kept, recomputed, repeats)

    @property
    def middle(self) -> range:
        """Return the blocks of a group that is repeated, or of its neighbour."""
        start = self.first + NUM_RECORDED_GROUPS // 2 * self.period
        return range(start, start + self.period)

    def group_of(self, block: int) -> int:
        """Return the number of the group of a block."""
        return max(0, (block - self.first) // self.period)


def _additions(*repeats: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((group, added) for group, added in repeats if added)


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
