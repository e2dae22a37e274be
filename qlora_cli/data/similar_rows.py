"""Find rows that differ from another one in one word or one number.

Candidates are rows that share rare sequences of `_WIDTH` tokens (shingles). Of each row the
shingles with the smallest hashes are compared, as MinHash does. A candidate is then compared with
the other row token by token, the prompt and the trained tokens apart. Shingles that many rows have
are of a template; they do not count, so rows of one template do not resemble each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encoded import Part
from qlora_cli.data.examples import Examples, chosen_of_parts

_WIDTH = 4
"""Tokens of a shingle."""
_KEPT = 16
"""Shingles of a row that are compared, on average."""
_SAMPLE = 2000
"""Rows among which a shingle of a template is frequent."""
_TEMPLATE_SHARE = 0.05
_TEMPLATE_ROWS = 5
"""Share and number of the rows of the sample from which on a shingle is of a template."""
_TABLE_BITS = 22
_COMMON = 0.3
"""Share of the compared shingles that two candidates have in common."""
_CHANGED = 0.1
"""Share of the tokens outside the template that may differ, of the prompt and of the answer."""
_WORD = 3
"""Tokens that may differ at one place: those of a word or a number."""
_ANCHOR = 3
"""Equal tokens that end a place where rows differ."""
_BLOCK = 2**20
"""Tokens whose shingles are computed at once."""
_LARGEST = np.float64(2**64 - 2**11)
"""The largest hash that float64 represents."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class _Shingles:
    """Hashes of the shingles of some rows, and for each the row it begins in.

    rows: places of the rows. is_trained: whether the first token of each shingle is trained.
    """

    hashes: Hashes
    rows: NDArray[np.int64]
    is_trained: NDArray[np.bool_]

    def outside(self, template: NDArray[np.bool_]) -> _Shingles:
        """Return the shingles that are not in the table of those of the template."""
        kept = ~template[_slot(self.hashes)]
        return _Shingles(self.hashes[kept], self.rows[kept], self.is_trained[kept])


@dataclass(frozen=True)
class _Row:
    """A row's tokens, which of them are trained, and its value, NaN without one."""

    ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]
    value: float

    def text(self, trained: bool) -> str:
        """Return the trained or the other tokens, as one character each.

        Parts of strings are compared faster than parts of lists. The characters are from U+10000
        on, where the million that Unicode has are all valid.
        """
        ids = self.ids[self.is_trained == trained].astype("<u4") + np.uint32(0x10000)
        return str(ids.tobytes(), "utf-32-le", "replace")


class _RowSets:
    """Several sets of examples, whose places are counted through."""

    def __init__(self, sets: Sequence[Examples]) -> None:
        self.sets = sets
        self.firsts = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def row(self, place: int) -> _Row:
        """Return one of the examples."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        examples, index = self.sets[number], place - int(self.firsts[number])
        columns = (examples.rows, examples.starts, examples.lengths)
        row, start, length = (int(column[index]) for column in columns)
        encoded = examples.encoded
        ids = encoded.ids(row, start, length)
        return _Row(ids, encoded.trained(row, start, length), float(encoded.values[row]))

    def shingles(self, places: NDArray[np.int64]) -> Iterator[_Shingles]:
        """Yield the shingles of some examples that are not pieces, some of them at a time."""
        for first, examples in zip(self.firsts.tolist(), self.sets, strict=False):
            own = places[(places >= first) & (places < first + len(examples))] - first
            own = own[examples.pieces[own] == 0]
            for part, chosen in chosen_of_parts(examples.take(own)):
                taken = own[chosen]
                cuts = np.cumsum(examples.lengths[taken], dtype=np.int64) // _BLOCK
                for block in np.split(taken, np.flatnonzero(np.diff(cuts)) + 1):
                    yield _block(examples, part, block, first)


@dataclass(frozen=True)
class _Sketch:
    """What is compared of all rows.

    hashes, rows: the chosen shingles. prompt, answer: number of tokens outside the template of
    each row.
    """

    hashes: Hashes
    rows: NDArray[np.int64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]

    @classmethod
    def of(cls, all_rows: _RowSets) -> _Sketch:
        """Return the sketch of all rows."""
        number = len(all_rows)
        template = _template(all_rows)
        hashes, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        prompt, answer = np.zeros((2, number), np.int64)
        for found in all_rows.shingles(np.arange(number)):
            rare = found.outside(template)
            prompt += np.bincount(rare.rows[~rare.is_trained], minlength=number)
            answer += np.bincount(rare.rows[rare.is_trained], minlength=number)
            share = np.minimum(1, _KEPT / np.maximum(1, prompt + answer))
            limit = (share * _LARGEST).astype(np.uint64)
            kept = rare.hashes < limit[rare.rows]
            hashes.append(rare.hashes[kept])
            rows.append(rare.rows[kept])
        return cls(np.concatenate(hashes), np.concatenate(rows), prompt, answer)

    def candidates(self) -> NDArray[np.int64]:
        """Return pairs (earlier row, row) with many common shingles, in the order of the row."""
        number = len(self.prompt)
        order = np.lexsort((self.rows, self.hashes))
        hashes, rows = self.hashes[order], self.rows[order]
        linked = (hashes[1:] == hashes[:-1]) & (rows[1:] != rows[:-1])
        keys, common = np.unique(rows[1:][linked] * number + rows[:-1][linked], return_counts=True)
        pairs = np.stack([keys % number, keys // number])
        chosen = np.bincount(self.rows, minlength=number)
        is_near = common >= np.maximum(2, _COMMON * chosen[pairs].min(axis=0))
        return pairs[:, is_near].T


def similar_rows(*sets: Examples) -> dict[int, int]:
    """Return place -> place of an earlier example that differs in a word or a number.

    sets: are compared with one another; places are counted through them. Pieces of split rows are
    not compared. Equal rows, and texts with different labels, are not similar.
    """
    all_rows = _RowSets(sets)
    sketch = _Sketch.of(all_rows)
    similar: dict[int, int] = {}
    for earlier, later in sketch.candidates().tolist():
        if later not in similar and _is_similar(all_rows, sketch, earlier, later):
            similar[later] = similar.get(earlier, earlier)
    return similar


def _is_similar(all_rows: _RowSets, sketch: _Sketch, first: int, second: int) -> bool:
    """Return whether prompt and trained tokens of two rows differ in few of their tokens."""
    row, other = all_rows.row(first), all_rows.row(second)
    # Rows without a value have NaN there, which differs from itself.
    if row.value != other.value and not (isnan(row.value) and isnan(other.value)):
        return False
    is_equal = True
    for trained, size in ((False, sketch.prompt), (True, sketch.answer)):
        text, other_text = row.text(trained), other.text(trained)
        limit = int(_CHANGED * min(size[first], size[second]))
        if not differ_in_one_word(text, other_text, limit):
            return False
        is_equal = is_equal and text == other_text
    return not is_equal


def differ_in_one_word(first: str, second: str, limit: int) -> bool:
    """Return whether two texts differ in one word at most, which may be replaced several times.

    first, second: one character for each token. limit: number of tokens that may differ, in all
    places together. At one place, at most `_WORD` tokens differ, and `_ANCHOR` equal ones follow.
    """
    changed = i = j = 0
    replaced: set[tuple[str, str]] = set()
    while True:
        equal = _common(first, second, i, j)
        i, j = i + equal, j + equal
        if i == len(first) and j == len(second):
            return True
        place = _difference(first, second, i, j)
        if place is None:
            return False
        replaced.add((first[i : i + place[0]], second[j : j + place[1]]))
        changed += max(place)
        if changed > limit or len(replaced) > 1:
            return False
        i, j = i + place[0], j + place[1]


def _common(first: str, second: str, i: int, j: int) -> int:
    """Return the number of equal tokens from `i` and `j` on."""
    rest = min(len(first) - i, len(second) - j)
    if first[i : i + rest] == second[j : j + rest]:
        return rest
    low, high = 0, rest
    while high - low > 1:
        middle = (low + high) // 2
        if first[i + low : i + middle] == second[j + low : j + middle]:
            low = middle
        else:
            high = middle
    return low


_DIFFERENCES = sorted(
    ((a, b) for a in range(_WORD + 1) for b in range(_WORD + 1) if a or b),
    key=lambda place: (max(place), sum(place)),
)


def _difference(first: str, second: str, i: int, j: int) -> tuple[int, int] | None:
    """Return the smallest numbers of tokens after which the texts are equal again."""
    for a, b in _DIFFERENCES:
        if i + a > len(first) or j + b > len(second):
            continue
        if first[i + a : i + a + _ANCHOR] == second[j + b : j + b + _ANCHOR]:
            return a, b
    return None


def _template(all_rows: _RowSets) -> NDArray[np.bool_]:
    """Return a table of the shingles that many rows have, by the last bits of their hashes."""
    number = len(all_rows)
    sample = np.unique(np.linspace(0, number - 1, min(number, _SAMPLE)).astype(np.int64))
    counts = np.zeros(2**_TABLE_BITS, np.int32)
    for found in all_rows.shingles(sample):
        order = np.lexsort((found.rows, found.hashes))
        hashes, rows = found.hashes[order], found.rows[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        np.add.at(counts, _slot(hashes[is_new]), 1)
    result: NDArray[np.bool_] = counts >= max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(sample))
    return result


def _slot(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64(2**_TABLE_BITS - 1)).astype(np.int64)


def _block(examples: Examples, part: Part, places: NDArray[np.int64], first: int) -> _Shingles:
    """Return the shingles of examples whose rows are in one part. first: of their set."""
    lengths = examples.lengths[places].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    begins = part.bounds[examples.rows[places] - part.first] + examples.starts[places]
    position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    index = np.repeat(begins, lengths) + position
    is_trained = part.trained[index].astype(bool)
    values = _mixed(part.ids[index].astype(np.uint64) * np.uint64(2) + is_trained)
    is_whole = position + _WIDTH <= np.repeat(lengths, lengths)
    hashes = np.zeros(len(values), np.uint64)
    for offset in range(_WIDTH):
        hashes[: len(values) - offset] += values[offset:] * np.uint64(2 * offset + 1)
    rows = np.repeat(places + first, lengths)
    return _Shingles(_mixed(hashes)[is_whole], rows[is_whole], is_trained[is_whole])


def _mixed(values: Hashes) -> Hashes:
    """Return a hash of each value (the finalizer of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
