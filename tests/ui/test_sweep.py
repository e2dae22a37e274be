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


def text_of(renderable: RenderableType) -> str:
    console = Console(width=100, record=True)
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
