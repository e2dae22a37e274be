"""Each result as text: it contains what it must, with and without color."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from qlora_cli.memory.ledger import CATEGORIES, Allocator, Phase
from qlora_cli.plan.results import Compared
from qlora_cli.ui import memory, memory_facts, planned, tables
from qlora_cli.ui.categories import CATEGORY_STYLES, category_label
from qlora_cli.ui.summary import held_out_loss
from qlora_cli.units import GIB, format_bytes
from tests.helpers import results


def text_of(shown: RenderableType, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, markup=False).print(shown, soft_wrap=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("render", "result", "expected"),
    [
        (
            planned.plan,
            results.PLAN,
            ["fits on", "6,815,744 of 8,030,261,248", "data.seq_len=512", "13.6 MB"],
        ),
        (tables.train, results.TRAIN, ["runs/x", "120", "1.234", "1.300", "2,413 tokens/s"]),
        (
            tables.train,
            results.TRAIN,
            ["2.100 before training, 1.300 after (the exported weights, of step 80)"],
        ),
        (tables.report, results.REPORT, ["2.100 before training, 0.602 after step 50"]),
        (tables.report, results.REPORT, ["done", "50", "tokens/s", "Wh", "Llama-3.1-8B, 4 bit"]),
        (tables.merge, results.MERGE, ["runs/x/merged", "291", "16.0 GiB", "dequantized"]),
        (
            tables.verify,
            results.VERIFY,
            ["passed", "0.012", "top-1 agreement", "99.30%", "the first 61 of 64 tokens agree"],
        ),
        (tables.evaluation, results.EVAL, ["1.2000", "3.32", "61.00%", "10,000"]),
        (
            tables.data,
            results.DATA,
            ["100 (messages)", "60.0% of them trained", "! 3 rows", "⟦ you⟧"],
        ),
        (tables.doctor, results.DOCTOR, ["ok", "limited", "more"]),
        (
            tables.quickstart,
            results.QUICKSTART,
            ["2.100 before training, 0.700 after", "Swan is cheap"],
        ),
    ],
)
def test_a_result_contains_its_figures(
    render: Callable[[object], RenderableType], result: object, expected: list[str]
) -> None:
    text = text_of(render(result))
    assert "\x1b" not in text
    for words in expected:
        assert words in text


def test_each_category_of_the_ledger_has_a_label_and_a_color() -> None:
    assert tuple(CATEGORY_STYLES) == CATEGORIES
    assert len({style.label for style in CATEGORY_STYLES.values()}) == len(CATEGORIES)
    assert len({style.color for style in CATEGORY_STYLES.values()}) == len(CATEGORIES)


def test_the_phase_table_shows_each_category_and_their_sum() -> None:
    text = text_of(memory.phase_table(results.LEDGER))
    for category, size in results.STEP.items():
        (line,) = [row for row in text.splitlines() if category_label(category) in row]
        assert line.count(format_bytes(size)) >= 2
    (peak,) = [row for row in text.splitlines() if row.strip().startswith("peak")]
    assert peak.count(format_bytes(sum(results.STEP.values()))) == 2


def test_categories_without_bytes_are_left_out() -> None:
    shown = memory.phase_grid(results.LEDGER).rows
    used = {c for phase in results.LEDGER.phases for c, size in phase.at_peak.items() if size}
    assert list(shown) == [category_label(c) for c in CATEGORIES if c in used]


def test_the_method_table_shows_whether_figures_are_measured() -> None:
    text = text_of(memory.method_table(results.LEDGER))
    assert "full fine-tuning (planned)" in text
    assert "LoRA, 4-bit base (measured)" in text
    assert "less peak memory than full fine-tuning" in text


def test_the_comparison_shows_the_ratio_to_full_fine_tuning() -> None:
    four = Compared("lora", 4, 10, {"base": 10}, 18.37)
    text = text_of(memory.comparison_table([*results.PLAN.compare, four]))
    assert text.split("full / this")[1].split() == ["1.0x", "18.4x"]


def test_counters_are_shown_only_if_the_device_has_them() -> None:
    assert "reserved by torch 7.00 GiB" in text_of(memory.phase_table(results.LEDGER))
    without = replace(results.LEDGER, allocator=Allocator())
    assert "Counters" not in text_of(memory.phase_table(without))
    assert memory_facts.counter_differences(without) == {}


def test_a_plan_that_does_not_fit_is_reported() -> None:
    assert "DOES NOT FIT" in text_of(planned.plan(replace(results.PLAN, fits=False)))


def test_the_peak_of_a_plan_is_in_a_phase_of_training_even_if_merging_needs_more() -> None:
    merge = Phase("merge", 50 * GIB, 0, {"temporary": 50 * GIB})
    ledger = replace(results.LEDGER, phases=(*results.LEDGER.phases, merge))
    text = text_of(planned.plan(replace(results.PLAN, ledger=ledger)))
    assert "in phase first step" in text.splitlines()[0]


def test_the_held_out_loss_names_its_lowest_value() -> None:
    evaluations = [{"step": 4, "eval_loss": 0.5}, {"step": 8, "eval_loss": 0.75}]
    shown = held_out_loss(evaluations)
    assert shown == {"held-out loss": "0.750 after step 8, lowest 0.500 after step 4"}
    untrained = held_out_loss([{"step": 0, "eval_loss": 2.0}])
    assert untrained == {"held-out loss": "2.000 before training"}
    assert held_out_loss(()) == {}


def test_a_failed_verification_lists_its_faults() -> None:
    failed = replace(results.VERIFY, passed=False, faults=("model.norm.weight is missing",))
    text = text_of(tables.verify(failed))
    assert "FAILED" in text
    assert "model.norm.weight is missing" in text


def test_a_verification_without_a_comparison_shows_no_figures() -> None:
    nan = float("nan")
    failed = replace(
        results.VERIFY,
        passed=False,
        mean_kl=nan,
        max_logit_difference=nan,
        top1_agreement=nan,
        faults=("x",),
    )
    assert "nan" not in text_of(tables.verify(failed))


def test_a_long_path_is_not_broken_over_lines() -> None:
    path = Path("/".join(["folder"] * 30))
    assert str(path) in text_of(tables.merge(replace(results.MERGE, out=path)))


def _is_complete(text: str, labels: Iterable[str], width: int) -> bool:
    words = {word for label in labels for word in label.split()}
    return "…" not in text and all(word in text for word in words) and _widest(text) <= width


def _widest(text: str) -> int:
    """Return the length of the longest line of a table, which begins with a label."""
    return max(len(line.rstrip()) for line in text.splitlines() if line.startswith(" "))


def test_tables_fit_eighty_columns() -> None:
    names = ("load", "first_step", "step", "checkpoint", "eval", "merge")
    phases = tuple(replace(results.LEDGER.phases[1], name=name) for name in names)
    text = text_of(memory.phase_table(replace(results.LEDGER, phases=phases)), width=80)
    assert _is_complete(text, map(category_label, results.STEP), 80)
    text = text_of(memory.method_table(results.LEDGER), width=80)
    assert _is_complete(text, map(category_label, results.STEP), 80)


def test_the_comparison_fits_eighty_columns_with_its_labels() -> None:
    methods = [Compared("lora", bits, 1, results.STEP, 18.37) for bits in (16, 8, 4)]
    text = text_of(memory.comparison_table([*results.PLAN.compare, *methods]), width=80)
    assert _is_complete(text, map(category_label, results.STEP), 80)
    assert "LoRA" in text
    assert "16-bit base" in text


def test_a_negligible_part_of_the_peak_is_not_shown_as_a_size() -> None:
    full = {**results.FULL, "base": 256}
    before = replace(results.LEDGER.before, peak_bytes=sum(full.values()), at_peak=full)
    ledger = replace(results.LEDGER, before=before)
    assert memory.method_grid(ledger).rows["base"] == ("-", "3.42 GiB")
