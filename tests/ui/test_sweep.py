"""The table and the figure of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from qlora_cli.jobs.sweep_results import (
    DOES_NOT_FIT,
    DONE,
    RefusedCell,
    SweepResult,
    SweepRun,
    make_table,
)
from qlora_cli.ui.sweep import sweep
from qlora_cli.ui.sweep_figure import sweep_figure, write


def item(settings: dict[str, str], seed: int, loss: float | None) -> SweepRun:
    name = "_".join([*settings.values(), str(seed)])
    if loss is None:
        return SweepRun(name, settings, seed, (), DOES_NOT_FIT, "the job needs 9 GiB", {})
    metrics = {"eval_loss": loss, "train_loss": 9.0, "trainable_parameters": 1234, "accuracy": 0.5}
    return SweepRun(name, settings, seed, (), DONE, None, metrics)


def result_of(folder: Path, runs: list[SweepRun], *, higher: bool = False) -> SweepResult:
    axes = {key: tuple(dict.fromkeys(r.settings[key] for r in runs)) for key in runs[0].settings}
    table = make_table(runs, "eval_loss", higher)
    refused = (RefusedCell({"base.bits": "4"}, "set base.bits=16"),) * 2
    return SweepResult(folder, folder, "eval_loss", higher, axes, tuple(runs), table, refused)


def text_of(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, record=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


RANKS = [
    item({"adapter.rank": rank, "adapter.targets": targets}, seed, loss)
    for rank, targets, losses in (
        ("2", "[q]", (2.0, 3.0)),
        ("16", "[q]", (1.0, 1.5)),
        ("2", "all", (None, None)),
    )
    for seed, loss in enumerate(losses)
]


def test_the_table_has_mean_and_spread_and_what_is_not_done(tmp_path: Path) -> None:
    text = text_of(sweep(result_of(tmp_path, RANKS)))
    assert "2.5000 ± 0.7071" in text
    assert "1.2500 ± 0.3536" in text
    assert "1,234" in text
    assert "train loss" not in text
    assert "! 2_all_0 does not fit: the job needs 9 GiB" in text
    assert "! 2 combinations are not possible: set base.bits=16" in text


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_settings_and_the_metric_are_complete_on_a_narrow_console(
    tmp_path: Path, width: int
) -> None:
    runs = [
        item({"base.bits": "4", "adapter.method": method, "adapter.targets": "[q,v]"}, seed, loss)
        for method, loss in (("lora", 2.0), ("full", 1.0))
        for seed in (0, 1)
    ]
    lines = text_of(sweep(result_of(tmp_path, runs)), width).splitlines()
    (header,) = (line for line in lines if line.lstrip().startswith("method"))
    assert header.split()[:6] == ["method", "targets", "bits", "seeds", "held-out", "loss"]
    for method, loss in (("lora", "2.0000 ± 0.0000"), ("full", "1.0000 ± 0.0000")):
        assert any(
            line.split()[:4] == [method, "[q,v]", "4", "2"] and loss in line for line in lines
        )
    left_out = {"accuracy", "trained"} - set(header.split())
    assert bool(left_out) == any("Without" in line for line in lines)
    assert all(any("Without" in line and name in line for line in lines) for name in left_out)


@pytest.mark.parametrize(("higher", "rank"), [(False, "16"), (True, "2")])
def test_the_best_cell_has_the_lowest_or_the_highest_mean(
    tmp_path: Path, higher: bool, rank: str
) -> None:
    best = result_of(tmp_path, RANKS, higher=higher).best
    assert best is not None
    assert best.settings["adapter.rank"] == rank


def test_a_number_is_the_horizontal_axis(tmp_path: Path) -> None:
    (axes,) = sweep_figure(result_of(tmp_path, RANKS)).axes
    assert axes.get_xlabel() == "adapter.rank"
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "16"]
    assert list(axes.lines[0].get_ydata()) == [2.5, 1.25]


def test_without_a_number_each_cell_is_a_row(tmp_path: Path) -> None:
    runs = [item({"adapter.targets": name}, 0, 1.0 + i) for i, name in enumerate(("[q]", "all"))]
    (axes,) = sweep_figure(result_of(tmp_path, runs)).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["targets [q]", "targets all"]
    assert axes.get_xlabel() == "held-out loss"


def test_the_figure_is_a_file_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    written = write(result_of(tmp_path, RANKS))
    assert written.plot == tmp_path / "sweep.png"
    assert written.plot.read_bytes().startswith(b"\x89PNG")
