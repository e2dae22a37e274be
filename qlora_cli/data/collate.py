"""Concatenate rows into batches, without padding.

All rows of a micro-batch, packed or not, are concatenated to one sequence. `segments` gives the
length of each row, so that attention stays inside a row; positions start at 0 in each row; and the
last token of a row predicts nothing. So no row attends to another or is trained on its tokens. A
row of several segments, such as a pair of answers, is treated in the same way at its segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.nn.labels import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The sizes that the memory of a micro-batch depends on. It grows with each of them.

    tokens: number of tokens of all rows. targets: number of trained tokens. segments: number of
    segments, of which a row has one or several. longest: number of tokens of the longest segment.
    """

    tokens: int
    targets: int
    segments: int
    longest: int

    @classmethod
    def upper_bound(cls, sizes: Sequence[BatchSize]) -> BatchSize:
        """Return the maximum of each field over all sizes."""
        return cls(
            max(size.tokens for size in sizes),
            max(size.targets for size in sizes),
            max(size.segments for size in sizes),
            max(size.longest for size in sizes),
        )


def peak_batches(sizes: Sequence[BatchSize]) -> set[int]:
    """Return the indices of the micro-batches at which memory peaks.

    These are the ones with the most tokens, the most targets and the most segments.
    """
    return largest_columns(np.array([astuple(size) for size in sizes], np.int64).reshape(-1, 4).T)


def largest_columns(columns: NDArray[np.int64]) -> set[int]:
    """Return the indices of the columns at which memory peaks, as `peak_batches`.

    columns: one row per field of BatchSize, one column per micro-batch.
    """
    tokens, targets, segments, _ = columns
    orders = (
        (tokens, targets, segments),
        (targets, tokens, segments),
        (segments, tokens, targets),
    )
    return {_first_largest(order) for order in orders if len(tokens)}


def _first_largest(order: Sequence[NDArray[np.int64]]) -> int:
    """Return the first index with the largest values, compared by the first array first."""
    candidates = np.arange(len(order[0]))
    for values in order:
        candidates = candidates[values[candidates] == values[candidates].max()]
    return int(candidates[0])


@dataclass(frozen=True)
class Batch:
    """A micro-batch of T tokens, on the CPU.

    input_ids, position_ids: (1, T) int64; positions start at 0 in each segment.
    labels: (T,) int64, the token after each position; IGNORE_INDEX if that token is not trained,
    and at the last position of each segment. segments: lengths of the segments of all rows, in
    order; their sum is T. num_targets: number of labels that are not IGNORE_INDEX.
    constants: (rows, k) float32, the constants of each row; None if the task computes none.
    values: (rows,) float32, what each row is labelled with; None if the targets are tokens.
    token_types: (1, T) int64, 1 at the tokens of the second text of a pair; None if the targets are
    tokens.
    origins: file and line of each segment's row, for messages; empty if they are not known.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segments: tuple[int, ...]
    num_targets: int
    constants: Tensor | None = None
    values: Tensor | None = None
    token_types: Tensor | None = None
    origins: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return self.labels.numel()

    @property
    def size(self) -> BatchSize:
        """Return the sizes that the memory of this batch depends on."""
        return BatchSize(self.num_tokens, self.num_targets, len(self.segments), max(self.segments))


def collate(rows: Sequence[Example]) -> Batch:
    """Return one batch of the rows, concatenated in order, on the CPU."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    segments: list[int] = []
    origins: list[str] = []
    for row in rows:
        ids += row.ids
        start = len(labels)
        labels += row.labels
        for length in row.segments or (len(row.ids),):
            segments.append(length)
            origins.append(row.origin)
            positions += range(length)
            labels[start : start + length] = [*labels[start + 1 : start + length], IGNORE_INDEX]
            start += length
    constants = [row.constants for row in rows if row.constants]
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor(labels),
        segments=tuple(segments),
        num_targets=sum(row.num_targets for row in rows),
        constants=torch.tensor(constants) if constants else None,
        origins=tuple(origins),
    )


def largest_batch(
    seq_len: int,
    micro_batch: int,
    vocab_size: int = 1,
    device: str | torch.device = "cpu",
    segments: int = 1,
) -> Batch:
    """Return the largest micro-batch that a recipe allows: full sequences, every token trained.

    seq_len: tokens per sequence; each sequence is one row. micro_batch: number of sequences.
    vocab_size: token ids are smaller than it. device: `meta` in a dry run. segments: number of
    segments of a row.
    """
    num_segments, tokens = micro_batch * segments, micro_batch * seq_len
    # The other segments of the row have two tokens, of which one is trained.
    longest = seq_len - 2 * (segments - 1)
    size = BatchSize(tokens, tokens - num_segments, num_segments, longest)
    return synthetic_batch(size, vocab_size, device)


def synthetic_batch(
    size: BatchSize, vocab_size: int = 1, device: str | torch.device = "cpu"
) -> Batch:
    """Return a micro-batch of a given size whose tokens are not from any text.

    One segment has `size.longest` tokens and the others share the rest equally, with at least one
    token each. So the batch has more than `size.tokens` tokens if the size is an upper bound with
    many segments. vocab_size: token ids are smaller than it. device: `meta` in a dry run.
    """
    others = size.segments - 1
    rest = max(size.tokens - size.longest, others)
    segments = (size.longest, *(rest // others + (n < rest % others) for n in range(others)))
    positions = torch.cat([torch.arange(length) for length in segments])
    ids = positions % vocab_size
    is_end = torch.zeros_like(ids)
    is_end[torch.tensor(segments).cumsum(0) - 1] = 1
    # The last position of a segment gets a target only if no other position is left.
    targets = is_end.argsort(stable=True)[: size.targets]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[targets] = ids.roll(-1)[targets]
    ids, positions, labels = (tensor.to(device) for tensor in (ids, positions, labels))
    return Batch(ids[None], positions[None], labels, segments, targets.numel())
