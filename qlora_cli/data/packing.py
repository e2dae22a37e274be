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

from qlora_cli.data.collate import Batch, BatchSize, collate, peak_batches
from qlora_cli.data.encode import Example

Sequences = list[list[int]]
"""Row numbers of each sequence."""
Collate = Callable[[Sequence[Example]], Batch]
"""Function that builds one micro-batch of examples: `collate`, or the `collate` of a task."""


def pack(lengths: Sequence[int], seq_len: int) -> Sequences:
    """Return sequences of at most `seq_len` tokens that contain every row once, undivided.

    lengths: number of tokens of each row. Rows of equal length are placed by row number.
    Raises ValueError if a row is longer than seq_len.
    """
    if lengths and max(lengths) > seq_len:
        raise ValueError(f"a row of {max(lengths)} tokens in sequences of {seq_len}")
    sequences: Sequences = []
    by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit n is set if a sequence has space for exactly n more tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, sequence = seq_len, len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        by_space[space - length].append(sequence)
        spaces |= 1 << (space - length)
    return sequences


class BatchSchedule:
    """The order of training: which micro-batches each optimizer step accumulates.

    It is a pure function of the arguments and the number of the optimizer step, so a resumed run
    needs only that number. A step does not span epochs; the last step of an epoch may have fewer
    micro-batches.

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
        self._lengths = [len(example.ids) for example in examples]
        self._targets = [example.num_targets for example in examples]
        self._seq_len = seq_len
        self._packing = packing
        self._micro_batch = micro_batch
        self._per_step = micro_batch * grad_accum
        self._seed = seed
        self._collate = collate
        self._current: tuple[int, Sequences] = (0, self._order(0))
        self.num_sequences = len(self._current[1])
        """Number of sequences in an epoch."""
        self.steps_per_epoch = -(-self.num_sequences // self._per_step)
        """Number of optimizer steps in an epoch, including a last step with fewer micro-batches."""

    def step_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of an optimizer step, on the CPU.

        step: counted from 0 over all epochs.
        """
        return [self._collate([self._examples[row] for row in rows]) for rows in self._rows(step)]

    def sizes(self, step: int) -> list[BatchSize]:
        """Return the sizes of the micro-batches of an optimizer step."""
        return [self._size(rows) for rows in self._rows(step)]

    def _size(self, rows: Sequence[int]) -> BatchSize:
        lengths = [self._lengths[row] for row in rows]
        targets = sum(self._targets[row] for row in rows)
        return BatchSize(sum(lengths), targets, len(rows), max(lengths))

    def _rows(self, step: int) -> Iterator[list[int]]:
        """Yield the row numbers of each micro-batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._current[0] != epoch:
            self._current = (epoch, self._order(epoch))
        first = index * self._per_step
        chosen = self._current[1][first : first + self._per_step]
        return _micro_batches(chosen, self._micro_batch)

    def _order(self, epoch: int) -> Sequences:
        """Return the sequences of an epoch in the order in which they are trained."""
        # A string as seed is hashed by SHA-512: the same on every machine and Python version.
        rng = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(self._lengths)))
        rng.shuffle(rows)
        if not self._packing:
            return [[row] for row in rows]
        packed = pack([self._lengths[row] for row in rows], self._seq_len)
        rng.shuffle(packed)
        return [[rows[place] for place in sequence] for sequence in packed]


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
    sequences: Sequences = []
    space = 0
    for row, example in enumerate(examples):
        if packing and sequences and len(example.ids) <= space:
            sequences[-1].append(row)
        else:
            sequences.append([row])
            space = seq_len
        space -= len(example.ids)
    for rows in _micro_batches(sequences, micro_batch):
        yield collate([examples[row] for row in rows])


def peak_steps(schedule: BatchSchedule, steps: range) -> set[int]:
    """Return the steps that contain a micro-batch at which memory peaks."""
    sizes = [(step, size) for step in steps for size in schedule.sizes(step)]
    peaks = peak_batches([size for _, size in sizes]) if sizes else set()
    return {sizes[index][0] for index in peaks}


def _micro_batches(sequences: Sequences, micro_batch: int) -> Iterator[list[int]]:
    """Yield the row numbers of each micro-batch."""
    for first in range(0, len(sequences), micro_batch):
        yield [row for sequence in sequences[first : first + micro_batch] for row in sequence]
