"""Rows as tensors, without padding.

All rows of a micro-batch, packed or not, lie one behind the other in a single sequence. Attention
is told where each begins (`segments`), positions start again with each, and the last token of a
row predicts nothing, so no row sees or trains its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import attrgetter

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.nn.loss import IGNORE_INDEX


@dataclass(frozen=True)
class BatchSize:
    """What the memory of a micro-batch depends on; it grows with each of these.

    tokens: of all rows. targets: the trained ones. longest: tokens of the longest row.
    """

    tokens: int
    targets: int
    rows: int
    longest: int

    @classmethod
    def bound(cls, sizes: Sequence[BatchSize]) -> BatchSize:
        """The size that none of these exceeds in anything."""
        return cls(*map(max, zip(*map(astuple, sizes), strict=True)))


def peak_batches(sizes: Sequence[BatchSize]) -> set[int]:
    """Which of these micro-batches memory peaks at: most tokens, most targets or most rows."""
    orders = (
        attrgetter("tokens", "targets", "rows"),
        attrgetter("targets", "tokens", "rows"),
        attrgetter("rows", "tokens", "targets"),
    )
    ranked = ([order(size) for size in sizes] for order in orders)
    return {ranks.index(max(ranks)) for ranks in ranked}


@dataclass(frozen=True)
class Batch:
    """A micro-batch of T tokens, on the host.

    input_ids, position_ids: (1, T) int64; positions begin at 0 in each row.
    labels: (T,) int64, the token after each position; -100 where that is not trained, and at each
    row's end. segments: the rows' lengths, which add up to T. num_targets: labels but -100.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segments: tuple[int, ...]
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return self.labels.numel()

    @property
    def size(self) -> BatchSize:
        """What its memory depends on."""
        return BatchSize(self.num_tokens, self.num_targets, len(self.segments), max(self.segments))


def collate(rows: Sequence[Example]) -> Batch:
    """The rows one behind the other, in order."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for row in rows:
        ids += row.ids
        positions += range(len(row.ids))
        labels += row.labels[1:]
        labels.append(IGNORE_INDEX)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor(labels),
        segments=tuple(len(row.ids) for row in rows),
        num_targets=sum(row.num_targets for row in rows),
    )


def largest_batch(
    seq_len: int, micro_batch: int, vocab_size: int = 1, device: str | torch.device = "cpu"
) -> Batch:
    """The largest micro-batch that a recipe allows: full sequences with every token trained.

    Each sequence is one row. vocab_size: ids stay below it. device: `meta` for a plan.
    """
    targets = micro_batch * (seq_len - 1)
    size = BatchSize(micro_batch * seq_len, targets, micro_batch, seq_len)
    return synthetic_batch(size, vocab_size, device)


def synthetic_batch(
    size: BatchSize, vocab_size: int = 1, device: str | torch.device = "cpu"
) -> Batch:
    """A micro-batch of this size, of no text: one row is the longest, the others share the rest.

    It has more tokens than asked for where the rows are too many, as a bound's may be.
    """
    others = size.rows - 1
    left = max(size.tokens - size.longest, others)
    segments = (size.longest, *(left // others + (n < left % others) for n in range(others)))
    positions = torch.cat([torch.arange(length) for length in segments])
    ids = positions % vocab_size
    is_end = torch.zeros_like(ids)
    is_end[torch.tensor(segments).cumsum(0) - 1] = 1
    # At a row's end only where there is no other place.
    places = is_end.argsort(stable=True)[: size.targets]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[places] = ids.roll(-1)[places]
    ids, positions, labels = (tensor.to(device) for tensor in (ids, positions, labels))
    return Batch(ids[None], positions[None], labels, segments, places.numel())
