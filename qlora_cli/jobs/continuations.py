"""Log-probabilities of continuations after their contexts, computed in packed forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import NotFinite
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.loss import score_targets
from qlora_cli.tasks.backbone import head_of, hidden_states

MAX_TOKENS = 2048
"""Tokens of a forward pass, unless one row alone has more. On a GPU each pass dequantizes all
weights, so one pass for many short rows is faster than one pass for each."""


@dataclass(frozen=True)
class Continuation:
    """Token ids whose probability is computed. context: not empty. ids: not empty."""

    context: Sequence[int]
    ids: Sequence[int]


@dataclass(frozen=True)
class ContinuationScore:
    """log_probability: sum over the ids, in nats. is_greedy: each id is the model's top-1 token."""

    log_probability: float
    is_greedy: bool


@dataclass
class _Row:
    """Token ids that the model reads, and the continuations whose scores they give.

    ids: without the last token of the continuation, which predicts nothing. wanted: (index of the
    continuation, its ids).
    """

    ids: tuple[int, ...]
    wanted: list[tuple[int, Sequence[int]]] = field(default_factory=list)


@torch.no_grad()
def score_continuations(
    loaded: LoadedModel,
    device: torch.device,
    continuations: Sequence[Continuation],
    max_length: int,
    on_scored: Callable[[int], None] = lambda _: None,
) -> list[ContinuationScore]:
    """Return the score of each continuation, in order.

    max_length: number of tokens that the model can read; the first tokens of a longer context are
    removed. on_scored: receives the number of continuations that are scored so far.
    Raises NotFinite if a log-probability is NaN or infinite.
    """
    scores: dict[int, ContinuationScore] = {}
    for rows in _packed(_rows(continuations, max_length)):
        scores |= _score(loaded, device, rows)
        on_scored(len(scores))
    return [scores[index] for index in range(len(continuations))]


def _rows(continuations: Sequence[Continuation], max_length: int) -> Iterable[_Row]:
    """Return the rows, of which continuations share one if they differ in the last token only."""
    rows: dict[tuple[int, ...], _Row] = {}
    for index, continuation in enumerate(continuations):
        complete = (*continuation.context, *continuation.ids)
        ids = complete[-(max_length + 1) :][:-1]
        wanted = continuation.ids[-len(ids) :]
        rows.setdefault(ids, _Row(ids)).wanted.append((index, wanted))
    return rows.values()


def _packed(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Yield the rows of each forward pass, with at most MAX_TOKENS tokens or one row."""
    packed: list[_Row] = []
    for row in rows:
        if packed and sum(len(other.ids) for other in packed) + len(row.ids) > MAX_TOKENS:
            yield packed
            packed = []
        packed.append(row)
    if packed:
        yield packed


def _score(
    loaded: LoadedModel, device: torch.device, rows: Sequence[_Row]
) -> dict[int, ContinuationScore]:
    """Return index -> score of the continuations of all rows, in one forward pass."""
    examples = [Example(list(row.ids), [IGNORE_INDEX] * len(row.ids), "") for row in rows]
    hidden = hidden_states(loaded, collate(examples), device)
    positions: list[int] = []
    targets: list[int] = []
    wanted: list[tuple[int, int]] = []
    end = 0
    for row in rows:
        end += len(row.ids)
        for index, ids in row.wanted:
            positions += range(end - len(ids), end)
            targets += ids
            wanted.append((index, len(ids)))
    weight, bias, transform = head_of(loaded)
    places = torch.tensor(positions).to(device), torch.tensor(targets).to(device)
    log_probabilities, is_top1 = score_targets(hidden, weight, *places, bias, transform)
    if not log_probabilities.isfinite().all():
        raise NotFinite(
            "the model's log-probabilities are NaN or infinite",
            hint="a computation in 16 bit overflows or the adapter is damaged",
        )
    lengths = [length for _, length in wanted]
    parts = zip(
        wanted, log_probabilities.cpu().split(lengths), is_top1.cpu().split(lengths), strict=True
    )
    return {
        index: ContinuationScore(float(values.sum()), bool(top1.all()))
        for (index, _), values, top1 in parts
    }
