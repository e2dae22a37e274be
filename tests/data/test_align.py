"""Texts are found between known pieces."""

from qlora_cli.data.align import align, common_prefix, marker, split


def test_contents_are_found_between_known_pieces():
    assert common_prefix("abc", "abd") == "ab"
    assert split(f"a{marker(1)}b{marker(3)}c", [marker(1), marker(3)]) == ["a", "b", "c"]
    assert split(f"a{marker(1)}b{marker(1)}", [marker(1)]) is None
    assert align("<one two>", ["<", ">"], [" one  two "]) == [(1, 8)]
    assert align("<one two>", ["<", ">"], ["one"]) is None
    assert align("<one>!", ["<", ">"], ["one"]) is None
