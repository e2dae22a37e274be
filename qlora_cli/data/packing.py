"""Decide which rows share a sequence and in which order all sequences are trained.

Packing is best fit decreasing: rows from the longest to the shortest, each into the fullest
sequence that it still fits in. It needs at most 11/9 of the minimum number of sequences, plus one
(Johnson 1974); on text it is within a percent. The number of sequences depends only on the lengths,
so every epoch has the same number of steps, although rows of equal length are exchanged and
sequences are shuffled in each epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.collate import Batch, BatchSize, collate, largest_columns
from qlora_cli.data.encode import Example
from qlora_cli.data.example_sizes import segment_sizes, sizes

Collate = Callable[[Sequence[Example]], Batch]
"""Function that builds one micro-batch of examples: `collate`, or the `collate` of a task."""


@dataclass(frozen=True)
class Sequences:
    """Row numbers of sequences: those of sequence i are `rows[bounds[i] : bounds[i + 1]]`."""

    rows: NDArray[np.int32]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> list[int]:
        """Return the row numbers of one sequence."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        numbers: list[int] = self.rows[self.bounds[index] : self.bounds[index + 1]].tolist()
        return numbers

    @classmethod
    def of(cls, rows: NDArray[np.int32], lengths: Sequence[int] | NDArray[np.int64]) -> Sequences:
        """Return consecutive sequences of the rows. lengths: number of rows in each."""
        return cls(rows, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def reordered(self, order: NDArray[np.int32], rows: NDArray[np.int32]) -> Sequences:
        """Return the sequences in another order. rows: what becomes of each row number."""
        lengths = np.diff(self.bounds)[order]
        starts = self.bounds[:-1][order]
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places = np.arange(len(self.rows)) + np.repeat(starts - first, lengths)
        return Sequences.of(rows[self.rows[places]], lengths)


def pack(lengths: Sequence[int] | NDArray[np.int32], seq_len: int) -> Sequences:
    """Return sequences of at most `seq_len` tokens that contain every row once, undivided.

    lengths: number of tokens of each row. Rows of equal length are placed by row number.
    Raises ValueError if a row is longer than seq_len.
    """
    lengths = np.asarray(lengths, np.int32)
    if len(lengths) and lengths.max() > seq_len:
        raise ValueError(f"a row of {lengths.max()} tokens in sequences of {seq_len}")
    longest_first = np.argsort(-lengths, kind="stable").astype(np.int32)
    sequence_of = np.empty(len(lengths), np.int32)
    by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit n is set if a sequence has space for exactly n more tokens
    number = 0
    for place, length in enumerate(lengths[longest_first].tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, sequence = seq_len, number
            number += 1
        sequence_of[place] = sequence
        by_space[space - length].append(sequence)
        spaces |= 1 << (space - length)
    by_sequence = np.argsort(sequence_of, kind="stable")
    return Sequences.of(longest_first[by_sequence], np.bincount(sequence_of, minlength=number))


_NUM_ORDERS = 64
"""Number of epochs with an order of their own. Without a limit, the plan of a job of many epochs,
which looks at every step, would take minutes."""


class _Epoch:
    """The micro-batches of one epoch.

    number: of the epoch. sequences: in the order of training. row_sizes: one row per field of
    BatchSize, one column per row of the data. sizes: the same with one column per micro-batch.
    """

    def __init__(
        self,
        number: int,
        sequences: Sequences,
        row_sizes: NDArray[np.int64],
        micro_batch: int,
    ) -> None:
        self.number = number
        self.sequences = sequences
        bounds = sequences.bounds
        self._bounds = np.append(bounds[:-1][::micro_batch], bounds[-1])
        self.num_batches = len(self._bounds) - 1
        first, ordered = self._bounds[:-1], row_sizes[:, sequences.rows]
        sums = np.add.reduceat(ordered[:3], first, axis=1)
        longest = np.maximum.reduceat(ordered[3:], first, axis=1)
        self.sizes = np.concatenate([sums, longest])

    def rows(self, batch: int) -> list[int]:
        """Return the row numbers of a micro-batch."""
        first, last = self._bounds[batch : batch + 2]
        numbers: list[int] = self.sequences.rows[first:last].tolist()
        return numbers


class BatchSchedule:
    """The order of training: which micro-batches each optimizer step accumulates.

    It is a pure function of the arguments and the number of the optimizer step, so a resumed run
    needs only that number. A step does not span epochs; the last step of an epoch may have fewer
    micro-batches.

    The order differs in each of `_NUM_ORDERS` epochs and then repeats.

    examples: all rows. seq_len: maximum number of tokens in a sequence. packing: whether several
    rows share a sequence. micro_batch: sequences per micro-batch. grad_accum: micro-batches per
    step. seed: of the shuffling. collate: the function of the task that builds a micro-batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seq_len: int,
        packing: bool,
        micro_batch: int,
        grad_accum: int,
        seed: int,
        collate: Collate = collate,
    ) -> None:
        self._examples = examples
        self._lengths, targets = sizes(examples)
        columns = (self._lengths, targets, *segment_sizes(examples))
        self._row_sizes = np.stack([column.astype(np.int64) for column in columns])
        self._constants: NDArray[np.float32] | None = None
        self._seq_len = seq_len
        self._packing = packing
        self._micro_batch = micro_batch
        self._per_step = micro_batch * grad_accum
        self._seed = seed
        self._collate = collate
        self._current = _Epoch(0, self._order(0), self._row_sizes, micro_batch)
        self.num_sequences = len(self._current.sequences)
        """Number of sequences in an epoch."""
        self.steps_per_epoch = -(-self.num_sequences // self._per_step)
        """Number of optimizer steps in an epoch, including a last step with fewer micro-batches."""
        self.distinct_steps = _NUM_ORDERS * self.steps_per_epoch
        """Number of optimizer steps after which the order of the rows repeats."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Return the number of tokens and of trained tokens in an epoch."""
        tokens, trained = self._row_sizes[:2].sum(axis=1).tolist()
        return tokens, trained

    def set_constants(self, constants: NDArray[np.float32]) -> None:
        """Give each row the constants of its examples from now on. constants: (rows, k)."""
        self._constants = constants

    def step_rows(self, step: int) -> list[list[int]]:
        """Return the row numbers of each micro-batch of an optimizer step."""
        epoch, batches = self._find(step)
        return [epoch.rows(index) for index in batches]

    def step_batches(self, step: int, parts: int = 1) -> list[Batch]:
        """Return the micro-batches of an optimizer step, on the CPU.

        step: counted from 0 over all epochs. parts: number of parts that each micro-batch is
        divided into, if it has so many rows.
        """
        divided = (part for rows in self.step_rows(step) for part in _divided(rows, parts))
        return [self._collate([self._example(row) for row in part]) for part in divided]

    def _example(self, row: int) -> Example:
        example = self._examples[row]
        if self._constants is None:
            return example
        return replace(example, constants=tuple(self._constants[row].tolist()))

    def sizes(self, step: int, parts: int = 1) -> list[BatchSize]:
        """Return the sizes of the micro-batches of `step_batches`."""
        if parts > 1:
            return [self._size(p) for rows in self.step_rows(step) for p in _divided(rows, parts)]
        epoch, batches = self._find(step)
        columns = epoch.sizes[:, batches.start : batches.stop].T.tolist()
        return [BatchSize(*column) for column in columns]

    def _size(self, rows: list[int]) -> BatchSize:
        tokens, targets, segments = self._row_sizes[:3, rows].sum(axis=1).tolist()
        return BatchSize(tokens, targets, segments, int(self._row_sizes[3, rows].max()))

    def size_columns(self, steps: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes of all micro-batches of some steps without a list of objects.

        The first array has the step of each micro-batch, the second one row per field of BatchSize.
        """
        numbers, columns = [np.empty(0, np.int64)], [np.empty((4, 0), np.int64)]
        for step in steps:
            epoch, batches = self._find(step)
            numbers.append(np.full(len(batches), step))
            columns.append(epoch.sizes[:, batches.start : batches.stop])
        return np.concatenate(numbers), np.concatenate(columns, axis=1)

    def _find(self, step: int) -> tuple[_Epoch, range]:
        """Return the epoch of a step and its micro-batches in the epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        number = epoch % _NUM_ORDERS
        if self._current.number != number:
            order = self._order(number)
            self._current = _Epoch(number, order, self._row_sizes, self._micro_batch)
        per_step = self._per_step // self._micro_batch
        first = index * per_step
        return self._current, range(first, min(first + per_step, self._current.num_batches))

    def _order(self, epoch: int) -> Sequences:
        """Return the sequences of an epoch in the order in which they are trained."""
        # A string as seed is hashed by SHA-512: the same on every machine and Python version.
        rng = random.Random(f"{self._seed}/{epoch}")
        rows = _shuffled(len(self._lengths), rng)
        if not self._packing:
            return Sequences.of(rows, np.ones(len(rows), np.int64))
        packed = pack(self._lengths[rows], self._seq_len)
        return packed.reordered(_shuffled(len(packed), rng), rows)


def _divided(rows: list[int], parts: int) -> list[list[int]]:
    """Return the rows in at most `parts` consecutive parts of about equal size."""
    size = -(-len(rows) // parts)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _shuffled(number: int, rng: random.Random) -> NDArray[np.int32]:
    """Return the numbers below `number` in random order."""
    numbers = list(range(number))
    rng.shuffle(numbers)
    return np.array(numbers, np.int32)


def eval_batches(
    examples: Sequence[Example],
    *,
    seq_len: int,
    packing: bool,
    micro_batch: int,
    collate: Collate = collate,
) -> Iterator[Batch]:
    """Yield the batches of an evaluation set, on the CPU: every row once, in order.

    With packing, a sequence of at most `seq_len` tokens contains as many consecutive rows as fit.
    micro_batch: sequences per batch. collate: the function of the task that builds a batch.
    """
    lengths, _ = sizes(examples)
    rows_in: list[int] = []
    space = 0
    for length in lengths.tolist():
        if packing and rows_in and length <= space:
            rows_in[-1] += 1
        else:
            rows_in.append(1)
            space = seq_len
        space -= length
    sequences = Sequences.of(np.arange(len(lengths), dtype=np.int32), rows_in)
    for first in range(0, len(sequences), micro_batch):
        last = min(first + micro_batch, len(sequences))
        rows = range(*sequences.bounds[[first, last]].tolist())
        yield collate([examples[row] for row in rows])


def peak_steps(schedule: BatchSchedule, steps: Sequence[int]) -> set[int]:
    """Return the steps that contain a micro-batch at which memory peaks, the first of each size."""
    numbers, columns = schedule.size_columns(steps[: schedule.distinct_steps])
    return {int(numbers[index]) for index in largest_columns(columns)}
