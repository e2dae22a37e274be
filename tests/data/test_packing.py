"""Packing, the schedule of training and batches: every row once, and the same order for a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.collate import collate, largest_batch
from qlora_cli.data.encode import Example
from qlora_cli.data.packing import BatchSchedule, eval_batches, pack, peak_steps
from qlora_cli.nn.labels import IGNORE_INDEX

LENGTHS = st.lists(st.integers(2, 32), min_size=1, max_size=60)


def examples(lengths):
    """Rows whose token ids contain the number of their row."""
    return [
        Example(
            [row * 100 + i for i in range(length)], [row * 100 + i for i in range(length)], str(row)
        )
        for row, length in enumerate(lengths)
    ]


def rows_of(batch):
    return [part[0].item() // 100 for part in batch.input_ids[0].split(batch.segments)]


def schedule_of(lengths, **changed):
    settings = {"seq_len": 32, "packing": True, "micro_batch": 2, "grad_accum": 3, "seed": 5}
    return BatchSchedule(examples(lengths), **{**settings, **changed})


@given(LENGTHS)
def test_packing_keeps_every_row_once_and_never_exceeds_seq_len(lengths):
    packed = pack(lengths, 32)
    assert sorted(row for sequence in packed for row in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in sequence) <= 32 for sequence in packed)


@given(LENGTHS)
def test_packing_is_within_its_bound(lengths):
    fewest = -(-sum(lengths) // 32)
    # If all sequences but one are more than half full, there are at most twice the minimum.
    assert len(pack(lengths, 32)) <= max(1, 2 * fewest)


@given(LENGTHS, st.randoms())
def test_the_number_of_sequences_depends_on_lengths_alone(lengths, random):
    shuffled = lengths.copy()
    random.shuffle(shuffled)
    assert len(pack(shuffled, 32)) == len(pack(lengths, 32))


def test_packing_finds_the_fewest_sequences_of_small_cases():
    assert len(pack([3, 5, 2, 6, 4, 4], 8)) == 3
    assert list(pack([8, 8], 8)) == [[0], [1]]
    with pytest.raises(ValueError, match="9 tokens"):
        pack([9], 8)


@given(LENGTHS, st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_contains_every_row_once(lengths, packing, micro_batch, grad_accum):
    schedule = schedule_of(lengths, packing=packing, micro_batch=micro_batch, grad_accum=grad_accum)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [batch for step in steps for batch in schedule.step_batches(step)]
        assert sorted(row for batch in batches for row in rows_of(batch)) == list(
            range(len(lengths))
        )
        assert all(sum(batch.segments) <= micro_batch * 32 for batch in batches)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_sizes_are_those_of_the_micro_batches(parts):
    schedule = schedule_of([2 + row * 7 % 31 for row in range(23)], micro_batch=3, grad_accum=2)
    for step in range(schedule.steps_per_epoch):
        batches = schedule.step_batches(step, parts)
        assert schedule.sizes(step, parts) == [batch.size for batch in batches]


def test_batches_are_a_pure_function_of_the_step():
    lengths = [2 + row * 7 % 31 for row in range(50)]
    schedule, same = schedule_of(lengths), schedule_of(lengths)
    steps = list(range(3 * schedule.steps_per_epoch))
    forwards = [[rows_of(batch) for batch in schedule.step_batches(step)] for step in steps]
    backwards = [[rows_of(batch) for batch in same.step_batches(step)] for step in reversed(steps)]
    assert forwards == backwards[::-1]
    assert forwards[0] != [
        [*rows_of(batch)] for batch in schedule_of(lengths, seed=6).step_batches(0)
    ]
    assert (
        forwards[: schedule.steps_per_epoch]
        != forwards[schedule.steps_per_epoch :][: schedule.steps_per_epoch]
    )


def test_a_job_of_very_many_steps_has_a_known_peak_before_it_starts():
    """The order of the rows repeats, so looking at every distinct step is enough."""
    schedule = schedule_of(range(2, 30))
    steps = range(3, 10**12)
    peaks = peak_steps(schedule, steps)
    assert peaks
    assert max(peaks) < 3 + schedule.distinct_steps
    first, last = schedule.step_batches(0), schedule.step_batches(schedule.distinct_steps)
    assert [rows_of(batch) for batch in first] == [rows_of(batch) for batch in last]
    orders = {
        tuple(tuple(rows_of(batch)) for batch in schedule.step_batches(step))
        for step in range(0, schedule.distinct_steps, schedule.steps_per_epoch)
    }
    assert len(orders) > 60, "until then each epoch has an order of its own"


def test_the_last_step_of_an_epoch_may_have_fewer_rows():
    schedule = schedule_of([30] * 7, packing=False)
    assert schedule.steps_per_epoch == 2
    assert [len(batch.segments) for batch in schedule.step_batches(1)] == [1]


@given(LENGTHS, st.booleans())
def test_eval_batches_contain_every_row_in_order(lengths, packing):
    batches = list(eval_batches(examples(lengths), seq_len=32, packing=packing, micro_batch=2))
    assert [row for batch in batches for row in rows_of(batch)] == list(range(len(lengths)))
    assert all(sum(batch.segments) <= 2 * 32 for batch in batches)


def test_labels_are_shifted_and_end_with_their_row():
    first = Example([1, 2, 3], [IGNORE_INDEX, 2, 3], "a")
    second = Example([4, 5], [4, IGNORE_INDEX], "b")
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [2, 3, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert (batch.segments, batch.num_targets) == ((3, 2), 2)


@given(LENGTHS)
def test_no_label_is_a_token_of_another_row(lengths):
    batch = collate(examples(lengths))
    assert sum(batch.segments) == batch.input_ids.shape[1] == batch.labels.shape[0]
    ids, labels = batch.input_ids[0].split(batch.segments), batch.labels.split(batch.segments)
    for row_ids, row_labels in zip(ids, labels, strict=True):
        assert torch.equal(row_ids[1:], row_labels[:-1])
        assert row_labels[-1] == IGNORE_INDEX
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())


def test_the_largest_batch_is_like_a_batch_of_rows():
    largest = largest_batch(8, 3, vocab_size=5)
    real = collate([Example([i % 5 for i in range(8)], [i % 5 for i in range(8)], "a")] * 3)
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(getattr(largest, name), getattr(real, name))
    assert (largest.segments, largest.num_targets) == (real.segments, real.num_targets)
    planned = largest_batch(8, 3, vocab_size=5, device="meta")
    assert planned.labels.device.type == planned.input_ids.device.type == "meta"
    assert planned.labels.dtype == planned.input_ids.dtype == torch.int64
