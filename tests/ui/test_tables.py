"""Each result on a page of text: what it must say, and that it says it without colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from qlora_cli.jobs.results import Compared
from qlora_cli.memory.ledger import CATEGORIES, Allocator
from qlora_cli.ui import memory, planned, tables
from qlora_cli.units import format_bytes
from tests.helpers import results


def text_of(shown: RenderableType, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, markup=False).print(shown, soft_wrap=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("render", "result", "told"),
    [
        (
            planned.plan,
            results.PLAN,
            ["fits on", "6,815,744 of 8,030,261,248", "data.seq_len=512", "13.6 MB"],
        ),
        (tables.train, results.TRAIN, ["runs/x", "120", "1.234", "1.300", "2,413 tokens/s"]),
        (tables.report, results.REPORT, ["done", "50", "tokens/s", "Wh", "Llama-3.1-8B, 4 bit"]),
        (tables.merge, results.MERGE, ["runs/x/merged", "291", "16.0 GiB", "dequantized"]),
        (tables.verify, results.VERIFY, ["passed", "0.012", "99.30%"]),
        (tables.evaluation, results.EVAL, ["1.2000", "3.32", "61.00%", "10,000"]),
        (tables.generation, results.GENERATE, [" world [x]", "run", "base", " bark"]),
        (tables.data, results.DATA, ["100 (messages)", "60.0% trained on", "! 3 rows", "⟦ you⟧"]),
        (tables.doctor, results.DOCTOR, ["ok", "limited", "more"]),
        (tables.quickstart, results.QUICKSTART, ["2.100 before, 0.700 after", "Swan is cheap"]),
    ],
)
def test_a_result_says_what_it_must(
    render: Callable[[object], RenderableType], result: object, told: list[str]
) -> None:
    text = text_of(render(result))
    assert "\x1b" not in text
    for words in told:
        assert words in text


def test_the_rows_of_a_phase_are_its_categories_and_their_sum() -> None:
    text = text_of(memory.phase_table(results.LEDGER))
    for category, size in results.STEP.items():
        (line,) = [row for row in text.splitlines() if memory.category_name(category) in row]
        assert line.count(format_bytes(size)) >= 2
    (peak,) = [row for row in text.splitlines() if row.strip().startswith("peak")]
    assert peak.count(format_bytes(sum(results.STEP.values()))) == 2


def test_categories_without_bytes_are_left_out() -> None:
    shown = memory.grid(memory.by_phase(results.LEDGER)).rows
    used = {c for phase in results.LEDGER.phases for c, size in phase.at_peak.items() if size}
    assert list(shown) == [memory.category_name(c) for c in CATEGORIES if c in used]


def test_before_and_after_say_where_their_figures_come_from() -> None:
    text = text_of(memory.before_and_after(results.LEDGER))
    assert "full fine-tuning (planned)" in text
    assert "LoRA, 4-bit base (measured)" in text
    assert "less memory than full fine-tuning" in text


def test_methods_side_by_side_show_how_many_times_smaller_they_are() -> None:
    four = Compared("lora", 4, 10, {"base": 10}, 18.37)
    text = text_of(memory.comparison([*results.PLAN.compare, four]))
    assert text.split("full / this")[1].split() == ["1.0x", "18.4x"]


def test_counters_of_the_device_stand_apart_and_only_where_there_are_any() -> None:
    assert "reserved by torch 7.00 GiB" in text_of(memory.phase_table(results.LEDGER))
    bare = replace(results.LEDGER, allocator=Allocator())
    assert "Counters" not in text_of(memory.phase_table(bare))


def test_a_plan_that_does_not_fit_says_so() -> None:
    assert "DOES NOT FIT" in text_of(planned.plan(replace(results.PLAN, fits=False)))


def test_a_failed_proof_names_its_faults() -> None:
    failed = replace(results.VERIFY, passed=False, faults=("model.norm.weight is missing",))
    text = text_of(tables.verify(failed))
    assert "FAILED" in text
    assert "model.norm.weight is missing" in text


def test_a_proof_that_could_not_be_measured_shows_no_figures() -> None:
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


def test_generated_text_keeps_its_own_lines() -> None:
    long = " word" * 100
    text = f"{long}\n\n[red]x"
    shown = tables.generation(replace(results.GENERATE, text=text, answers={"base": text}))
    assert text_of(shown) == f"{text}\n"
    assert text_of(tables.generation(results.GENERATE)) == "run:\n world [x]\n\nbase:\n bark\n"


def test_a_long_path_is_not_broken_over_lines() -> None:
    path = Path("/".join(["folder"] * 30))
    assert str(path) in text_of(tables.merge(replace(results.MERGE, out=path)))


def test_tables_fit_eighty_columns() -> None:
    text = text_of(memory.phase_table(results.LEDGER), width=80)
    assert "…" not in text
