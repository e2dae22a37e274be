"""Which rows share a sequence, and the order of a whole training.

Best fit decreasing: rows from the longest to the shortest, each into the fullest sequence that it
still fits in. It never needs more than 11/9 of the fewest sequences possible, plus one (Johnson
1974), and on text it is within a percent. How many sequences come out depends on the lengths
alone, so every epoch has the same number of steps, while rows of equal length change places and
sequences change their order from epoch to epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from qlora_cli.data.collate import Batch, BatchSize, collate, peak_batches
from qlora_cli.data.encode import Example

Sequences = list[list[int]]
"""Row numbers, by sequence."""
Collate = Callable[[Sequence[Example]], Batch]
"""A function that turns examples into one micro-batch: `collate`, or the `collate` of a task."""


def pack(lengths: Sequence[int], seq_len: int) -> Sequences:
    """Every row once, whole, in sequences of at most seq_len tokens; ties go by row number.

    Raises ValueError on a row longer than seq_len.
    """
    if lengths and max(lengths) > seq_len:
        raise ValueError(f"a row of {max(lengths)} tokens in sequences of {seq_len}")
    sequences: Sequences = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set where a sequence has room for exactly r more tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = seq_len, len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return sequences


class BatchSchedule:
    """The whole order of training: a pure function of the arguments and the optimizer's step.

    So a resumed run needs the number of its step and nothing else. A window is what one step
    accumulates; it does not span epochs, and an epoch's last window may be smaller.
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
        self._kept: tuple[int, Sequences] = (0, self._order(0))
        self.num_sequences = len(self._kept[1])
        """Sequences in an epoch."""
        self.steps_per_epoch = -(-self.num_sequences // self._per_step)
        """Optimizer steps in an epoch; its last partial window is one of them."""

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0 over all epochs."""
        return [self._collate([self._examples[row] for row in rows]) for rows in self._rows(step)]

    def sizes(self, step: int) -> list[BatchSize]:
        """Of the micro-batches of `window(step)`."""
        return [self._size(rows) for rows in self._rows(step)]

    def _size(self, rows: Sequence[int]) -> BatchSize:
        lengths = [self._lengths[row] for row in rows]
        targets = sum(self._targets[row] for row in rows)
        return BatchSize(sum(lengths), targets, len(rows), max(lengths))

    def _rows(self, step: int) -> Iterator[list[int]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._kept[0] != epoch:
            self._kept = (epoch, self._order(epoch))
        first = index * self._per_step
        chosen = self._kept[1][first : first + self._per_step]
        return _micro_batches(chosen, self._micro_batch)

    def _order(self, epoch: int) -> Sequences:
        # A text as seed is hashed by SHA-512, the same on every machine and Python.
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
    """Every row once, in order; with packing, as many to a sequence as follow and fit."""
    sequences: Sequences = []
    room = 0
    for row, example in enumerate(examples):
        if packing and sequences and len(example.ids) <= room:
            sequences[-1].append(row)
        else:
            sequences.append([row])
            room = seq_len
        room -= len(example.ids)
    for rows in _micro_batches(sequences, micro_batch):
        yield collate([examples[row] for row in rows])


def peak_steps(windows: BatchSchedule, steps: range) -> set[int]:
    """Those of the steps in which memory peaks."""
    sizes = [(step, size) for step in steps for size in windows.sizes(step)]
    found = peak_batches([size for _, size in sizes]) if sizes else set()
    return {sizes[number][0] for number in found}


def _micro_batches(sequences: Sequences, micro_batch: int) -> Iterator[list[int]]:
    """Row numbers."""
    for first in range(0, len(sequences), micro_batch):
        yield [row for sequence in sequences[first : first + micro_batch] for row in sequence]
