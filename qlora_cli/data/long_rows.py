"""Apply `data.long_rows`: what happens to rows that are longer than a sequence may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from qlora_cli.data.encode import Example
from qlora_cli.data.row_errors import SHOWN_PROBLEMS
from qlora_cli.errors import DataError, Problem
from qlora_cli.recipe.schema import DataFormat, LongRows
from qlora_cli.units import format_count

_NAMED = 3
"""Maximum number of rows that a report names."""
_VERBS = {"drop": "dropped", "truncate": "truncated", "split": "split"}


@dataclass
class LongRowsReport:
    """Which rows were too long and what was done with them.

    limit: maximum number of tokens in a row. rows, tokens: number of all rows and of their tokens.
    long_rows, long_tokens: those of the rows above the limit. lost_tokens: tokens that are not
    trained on because their rows were dropped or truncated. dropped: rows that were left out.
    untrained: truncated rows, or pieces of split rows, that were left out because no token of them
    is trained. pieces: pieces that split rows became. first: origin and number of tokens of the
    first long rows. policies: what was done.
    """

    limit: int
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


def policy_of(setting: Literal["auto"] | LongRows, row_format: DataFormat) -> LongRows:
    """Return what `data.long_rows` means for rows of a format."""
    if setting != "auto":
        return setting
    return "split" if row_format == "text" else "drop"


def fit_rows(
    examples: Sequence[Example], policy: LongRows, report: LongRowsReport
) -> Iterator[Example]:
    """Yield the examples with at most `report.limit` tokens each, in order.

    policy: what happens to longer ones. report: counts of these examples are added to it.
    Raises DataError listing the long rows if the policy is `error`.
    """
    limit = report.limit
    if policy == "error":
        _refuse(examples, limit)
    for example in examples:
        length = len(example.ids)
        report.rows += 1
        report.tokens += length
        if length <= limit:
            yield example
            continue
        _count(example, policy, report)
        kept = list(_kept(example, policy, limit))
        trained = [piece for piece in kept if piece.num_targets]
        report.pieces += len(trained) if policy == "split" else 0
        report.dropped += not trained
        report.untrained += len(kept) - len(trained)
        report.lost_tokens += length - sum(len(piece.ids) for piece in trained)
        yield from trained


def _count(example: Example, policy: LongRows, report: LongRowsReport) -> None:
    length = len(example.ids)
    report.long_rows += 1
    report.long_tokens += length
    report.longest = max(report.longest, length)
    if len(report.first) < _NAMED:
        report.first.append((example.origin, length))
    if policy not in report.policies:
        report.policies.append(policy)


def _kept(example: Example, policy: LongRows, limit: int) -> Iterator[Example]:
    if policy == "truncate":
        yield Example(example.ids[:limit], example.labels[:limit], example.origin)
    if policy == "split":
        yield from _pieces(example, limit)


def _pieces(example: Example, limit: int) -> Iterator[Example]:
    """Yield the example in the fewest consecutive pieces, of equal length up to one token.

    Pieces of equal length avoid a last piece of one token, which would have no target.
    """
    length = len(example.ids)
    count = -(-length // limit)
    bounds = [length * number // count for number in range(count + 1)]
    for number, (start, stop) in enumerate(pairwise(bounds), 1):
        origin = f"{example.origin} [{number}/{count}]"
        yield Example(example.ids[start:stop], example.labels[start:stop], origin)


def _refuse(examples: Sequence[Example], limit: int) -> None:
    too_long = [example for example in examples if len(example.ids) > limit]
    if not too_long:
        return
    longest = max(len(example.ids) for example in too_long)
    raise DataError(
        f"{format_count(len(too_long))} of {format_count(len(examples))} rows are longer than "
        f"{format_count(limit)} tokens, the limit of data.seq_len and of the model's positions:",
        [
            Problem(example.origin, f"{format_count(len(example.ids))} tokens")
            for example in too_long[:SHOWN_PROBLEMS]
        ],
        hint=f"the longest row has {format_count(longest)} tokens; set data.long_rows to drop, "
        "truncate or split, or raise data.seq_len up to the model's positions",
    )
