"""Groups of blocks: which repeat, and how many blocks a dry run needs."""

from __future__ import annotations

import pytest

from qlora_cli.plan.block_groups import BlockGroups, find_groups


@pytest.mark.parametrize(
    ("kinds", "expected", "num_recorded"),
    [
        ("a" * 9, BlockGroups(0, 1, 9), 4),
        ("ab" * 7, BlockGroups(0, 2, 14), 8),
        ("aaab" * 5 + "aa", BlockGroups(0, 4, 22), 18),
        ("d" + "a" * 8, BlockGroups(1, 1, 9), 5),
        ("aaaa", None, 0),
        ("abcdefghij" * 9, None, 0),
        ("aaaaaaaab", None, 0),
    ],
)
def test_the_fewest_blocks_that_represent_all(
    kinds: str, expected: BlockGroups | None, num_recorded: int
) -> None:
    found = find_groups(kinds)
    assert found == expected
    if found is not None:
        assert found.num_recorded_blocks == num_recorded


def test_first_blocks_and_the_rest_have_groups_of_their_own() -> None:
    groups = BlockGroups(first=1, period=2, num_blocks=12)
    assert [groups.group_of(block) for block in range(12)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert groups.number == 5
    assert groups.num_recorded_blocks == 10
    assert [groups.group_of(block) for block in groups.middle] == [2, 2]
