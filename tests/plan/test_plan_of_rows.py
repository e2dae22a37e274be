"""A job's plan uses the job's own rows and is not below the memory of any batch.

Memory grows with the tokens of a micro-batch, with its trained tokens (logits) and with its rows.
The largest of each may be in different batches, in a later epoch, or in the held-out set.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import plan_table
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import FILE_DTYPE, Case, SyntheticSource

from qlora_cli.data.collate import BatchSize, peak_batches, synthetic_batch
from qlora_cli.data.encode import Example
from qlora_cli.data.packing import BatchSchedule, peak_steps
from qlora_cli.events import Silent
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.files.source import WEIGHTS_FILE
from qlora_cli.jobs import train
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.memory.ledger import Ledger
from qlora_cli.models.build import skeleton
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Recipe

pytestmark = pytest.mark.slow

Row = tuple[int, int]
"""(tokens, trained tokens)."""
WIDE = Case("llama", "tiny", (), 32000, tied=True)
"""A vocabulary so large that the logits of a hundred targets need more memory than a block, unless
`train.loss_chunk` divides them."""


def write_rows(file: Path, rows: Sequence[Row]) -> Path:
    lines = []
    for tokens, targets in rows:
        ids = [(7 * place + tokens) % 1000 for place in range(tokens)]
        labels = [IGNORE_INDEX] * (tokens - targets) + ids[tokens - targets :]
        lines.append(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    file.write_text("".join(lines))
    return file


def trained(
    folder: Path, rows: Sequence[Row], held_out: Sequence[Row] = (), **settings: object
) -> Ledger:
    """Train on these rows and return the ledger with measured and planned figures."""
    base = folder / "base"
    WIDE.config().save_pretrained(base)
    source = SyntheticSource(*skeleton(WIDE.config(), FILE_DTYPE), with_values=True)
    shapes = {name: TensorSpec(FILE_DTYPE, source.shape(name)) for name in source.names()}
    write_tensors(base / WEIGHTS_FILE, shapes, source.read, {"format": "pt"})
    data = {
        "train": str(write_rows(folder / "rows.jsonl", rows)),
        "eval": str(write_rows(folder / "held_out.jsonl", held_out)) if held_out else None,
        "seq_len": 128,
        "packing": False,
    }
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "data": data,
            "train": {"grad_accum": 2, "lr": 1e-5, "loss_chunk": 1000, **settings},
            "output": str(folder / "run"),
        }
    )
    return train.run(recipe, recipe_path=None, resume=False, observer=Silent()).ledger


def error(ledger: Ledger) -> float:
    return ledger.planned_peak_bytes / ledger.measured_peak_bytes - 1


LONG_PROMPT, ANSWERS_ONLY = (128, 2), (100, 99)


def test_the_batch_with_the_most_trained_tokens_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [LONG_PROMPT, *[(20, 4)] * 11, ANSWERS_ONLY]
    ledger = trained(tmp_path / "all", rows)
    assert plan_table.UNDER <= error(ledger) <= plan_table.OVER

    def by_tokens(job: TrainingJob) -> list[object]:
        steps = range(job.steps)
        batches = [batch for step in steps for batch in job.schedule.step_batches(step)]
        return [max(batches, key=lambda batch: batch.num_tokens)] * 2

    # A plan of the longest batch alone is outside of the tolerance.
    monkeypatch.setattr(TrainingJob, "largest_step_batches", property(by_tokens))
    assert error(trained(tmp_path / "long", rows)) < plan_table.UNDER


def test_the_largest_held_out_batch_is_planned_and_measured(tmp_path: Path) -> None:
    held_out = [(8, 4)] * 4 + [(128, 127)] * 4
    ledger = trained(tmp_path, [(20, 8)] * 6, held_out, micro_batch=4)
    peak = max(ledger.phases, key=lambda phase: phase.peak_bytes)
    assert peak.name == "eval"
    assert plan_table.UNDER <= error(ledger) <= plan_table.OVER


def test_without_a_held_out_set_no_evaluation_is_planned(tmp_path: Path) -> None:
    ledger = trained(tmp_path, [(20, 8)] * 6)
    assert "eval" not in {phase.name for phase in ledger.phases}
    assert plan_table.UNDER <= error(ledger) <= plan_table.OVER


ROWS = st.lists(
    st.tuples(st.integers(2, 32), st.integers(1, 31)).map(lambda row: (row[0], min(row))),
    min_size=1,
    max_size=40,
)


def schedule_of(rows: Sequence[Row], **settings: object) -> BatchSchedule:
    examples = [
        Example([1] * tokens, [IGNORE_INDEX] * (tokens - targets) + [1] * targets, "")
        for tokens, targets in rows
    ]
    given_settings = {"seq_len": 32, "packing": True, "micro_batch": 3, "grad_accum": 2, "seed": 1}
    return BatchSchedule(examples, **{**given_settings, **settings})  # type: ignore[arg-type]


@given(ROWS, st.booleans(), st.integers(1, 3))
def test_no_batch_of_any_epoch_exceeds_the_bound(
    rows: Sequence[Row], packing: bool, epochs: int
) -> None:
    schedule = schedule_of(rows, packing=packing)
    steps = range(epochs * schedule.steps_per_epoch)
    bound = BatchSize.upper_bound([size for step in steps for size in schedule.sizes(step)])
    largest = synthetic_batch(bound)
    for batch in itertools.chain.from_iterable(map(schedule.step_batches, steps)):
        pairs = zip(astuple(batch.size), astuple(largest.size), strict=True)
        assert all(own <= limit for own, limit in pairs)
    assert largest.size == bound or largest.num_tokens == bound.longest + bound.segments - 1


@given(ROWS, st.booleans())
def test_peak_steps_contain_the_most_tokens_targets_and_rows(
    rows: Sequence[Row], packing: bool
) -> None:
    schedule = schedule_of(rows, packing=packing)
    steps = range(2 * schedule.steps_per_epoch)
    sizes = [size for step in peak_steps(schedule, steps) for size in schedule.sizes(step)]
    bound = BatchSize.upper_bound([size for step in steps for size in schedule.sizes(step)])
    at_peaks = BatchSize.upper_bound(sizes)
    assert (at_peaks.tokens, at_peaks.targets, at_peaks.segments) == (
        bound.tokens,
        bound.targets,
        bound.segments,
    )
    assert not peak_steps(schedule, range(5, 5))


def test_of_batches_with_one_equal_size_the_larger_is_a_peak() -> None:
    sizes = [BatchSize(10, 3, 2, 6), BatchSize(10, 8, 2, 6), BatchSize(9, 8, 4, 6)]
    assert peak_batches(sizes) == {1, 2}
