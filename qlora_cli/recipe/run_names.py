"""Names of the runs of a sweep: short, unique, and valid as names of folders."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

_MAX_LENGTH = 80
"""Longer names are cut and get a checksum."""


def short_keys(keys: Collection[str]) -> dict[str, str]:
    """Return dotted key -> its last part, or the key itself if two keys have the same last part."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in sorted(keys)}


def unique_names(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one name per row of settings, such as `rank-4_targets-q-v_seed-0`.

    Rows are different. A name gets a checksum of its row if it is long or if another row would have
    the same one.
    """
    names = ["_".join(_plain(f"{key}-{value}") for key, value in row.items()) for row in rows]
    number = Counter(names)
    return [
        name if 0 < len(name) <= _MAX_LENGTH and number[name] == 1 else _with_checksum(name, row)
        for name, row in zip(names, rows, strict=True)
    ]


def _plain(text: str) -> str:
    """Return the text with every character that is special in a path or a shell replaced."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-.")


def _with_checksum(name: str, row: Mapping[str, str]) -> str:
    checksum = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:8]
    return f"{name[:_MAX_LENGTH]}-{checksum}" if name else f"run-{checksum}"
