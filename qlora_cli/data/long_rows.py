"""Apply `data.long_rows`: what happens to rows that are longer than a sequence may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.examples import Examples
from qlora_cli.data.row_errors import SHOWN_PROBLEMS
from qlora_cli.errors import DataError, Problem
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat, LongRows
from qlora_cli.units import format_count

_NAMED = 3
"""Maximum number of rows that a report names."""
_VERBS = {"drop": "dropped", "truncate": "truncated", "split": "split"}


@dataclass
class LongRowsReport:
    """Which rows were too long and what was done with them.

    limit: maximum number of tokens in a row of one segment, or in a segment. row_limit: maximum
    number of tokens in a row of several segments; None for no other limit.
    rows, tokens: number of all rows and of their tokens. long_rows, long_tokens: those of the rows
    above the limit. lost_tokens: tokens that are not trained on because their rows were dropped or
    truncated. dropped: rows that were left out. untrained: truncated rows, or pieces of split rows,
    that were left out because no token of them is trained. pieces: pieces that split rows became.
    first: origin and number of tokens of the first long rows. policies: what was done.
    """

    limit: int
    row_limit: int | None = None
    rows: int = 0
    tokens: int = 0
    long_rows: int = 0
    long_tokens: int = 0
    lost_tokens: int = 0
    dropped: int = 0
    untrained: int = 0
    pieces: int = 0
    longest: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)
    policies: list[LongRows] = field(default_factory=list)

    def text(self) -> str | None:
        """Return the report as one sentence; None if no row was too long."""
        if not self.long_rows:
            return None
        names = ", ".join(f"{origin} ({format_count(tokens)})" for origin, tokens in self.first)
        more = ", ..." if self.long_rows > len(self.first) else ""
        verbs = " or ".join(_VERBS[policy] for policy in self.policies)
        share = self.long_tokens / self.tokens
        return (
            f"{format_count(self.long_rows)} of {format_count(self.rows)} rows, with {share:.1%} "
            f"of the tokens, are longer than {format_count(self.limit)} tokens and are {verbs}"
            f"{self._effect()}: {names}{more} (data.long_rows)"
        )

    def _effect(self) -> str:
        effects = []
        if self.pieces:
            effects.append(f"into {format_count(self.pieces)} pieces")
        if self.lost_tokens:
            effects.append(f"{self.lost_tokens / self.tokens:.1%} of the tokens are left out")
        if self.untrained:
            effects.append(
                f"{format_count(self.untrained)} without a trained token are left out completely"
            )
        text = ", ".join(effects)
        return f" {text}" if self.pieces else f" ({text})" if text else ""


_AUTOMATIC: Mapping[DataFormat, LongRows] = {"text": "split", "classification": "truncate"}


def policy_of(setting: Literal["auto"] | LongRows, row_format: DataFormat) -> LongRows:
    """Return what `data.long_rows` means for rows of a format."""
    if setting != "auto":
        return setting
    return _AUTOMATIC.get(row_format, "drop")


def fit_rows(examples: Examples, policy: LongRows, report: LongRowsReport) -> Examples:
    """Return the examples with at most `report.limit` tokens each, in order.

    examples: complete rows. policy: what happens to longer ones. report: counts of these examples
    are added to it. Raises DataError listing the long rows if the policy is `error`.
    """
    report.rows += len(examples)
    report.tokens += int(examples.lengths.sum(dtype=np.int64))
    _, longest = examples.segment_sizes()
    is_long = longest > report.limit
    if report.row_limit is not None:
        is_long |= examples.lengths > report.row_limit
    long = np.flatnonzero(is_long)
    if not len(long):
        return examples
    if policy == "error":
        _refuse(examples, long, report.limit)
    if policy not in report.policies:
        report.policies.append(policy)
    kept = [piece for place in long for piece in _kept(examples, int(place), policy, report)]
    fitting = np.flatnonzero(~is_long)
    places = np.concatenate([fitting, np.array([piece.place for piece in kept], np.int64)])
    result = examples.take(places)
    for column, name in zip(result.part_columns(), _PIECE_COLUMNS, strict=True):
        column[len(fitting) :] = [getattr(piece, name) for piece in kept]
    return result.take(np.argsort(places, kind="stable"))


@dataclass(frozen=True)
class _Piece:
    """A part of a long row. place: of the row. number, count: its number, 0 for a truncated row."""

    place: int
    start: int
    length: int
    targets: int
    number: int = 0
    count: int = 0


_PIECE_COLUMNS = ("start", "length", "targets", "number", "count")


def _kept(
    examples: Examples, place: int, policy: LongRows, report: LongRowsReport
) -> Iterator[_Piece]:
    """Yield what is kept of one long row, and count it in the report."""
    length = int(examples.lengths[place])
    report.long_rows += 1
    report.long_tokens += length
    report.longest = max(report.longest, length)
    if len(report.first) < _NAMED:
        report.first.append((examples.origin(place), length))
    bounds = _bounds(length, policy, report.limit)
    row = int(examples.rows[place])
    is_trained = examples.encoded.labels(row) != IGNORE_INDEX
    has_value = not np.isnan(examples.encoded.values[row])
    kept_tokens = trained = 0
    for number, (start, stop) in enumerate(bounds, 1):
        targets = int(has_value or np.count_nonzero(is_trained[start + 1 : stop]))
        if not targets:
            report.untrained += 1
            continue
        trained += 1
        kept_tokens += stop - start
        numbers = (number, len(bounds)) if policy == "split" else (0, 0)
        yield _Piece(place, start, stop - start, targets, *numbers)
    report.pieces += trained if policy == "split" else 0
    report.dropped += not trained
    report.lost_tokens += length - kept_tokens


def _bounds(length: int, policy: LongRows, limit: int) -> list[tuple[int, int]]:
    """Return the first token of each part of a row that is kept, and the one after its last.

    `split` makes the fewest consecutive pieces, of equal length up to one token. This avoids a last
    piece of one token, which would have no target.
    """
    if policy == "truncate":
        return [(0, limit)]
    if policy == "drop":
        return []
    count = -(-length // limit)
    return list(pairwise(length * number // count for number in range(count + 1)))


def _refuse(examples: Examples, long: NDArray[np.int64], limit: int) -> None:
    """Raise DataError listing the rows at the places `long`."""
    longest = int(examples.lengths.max())
    raise DataError(
        f"{format_count(len(long))} of {format_count(len(examples))} rows are longer than "
        f"{format_count(limit)} tokens, the limit of data.seq_len and of the model's positions:",
        [
            Problem(examples.origin(place), f"{format_count(int(examples.lengths[place]))} tokens")
            for place in map(int, long[:SHOWN_PROBLEMS])
        ],
        hint=f"the longest row has {format_count(longest)} tokens; set data.long_rows to drop, "
        "truncate or split, or raise data.seq_len up to the model's positions",
    )
