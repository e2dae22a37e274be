"""Experiments `sst2` and `rte`: accuracy of each method; `matrices`: which matrices, which rank."""

from __future__ import annotations

from typing import Any

from paper_cells import Cell, Experiment, Workspace, folder_bytes

SEEDS = 3
_FULL = ("adapter.method=full", "train.lr=1e-4")
_METHODS = {
    "lora": (),
    "head": ("adapter.method=head", "train.lr=1e-2"),
    "nf4": ("base.bits=4",),
    "full": _FULL,
    "nf4, all linears": ("base.bits=4", "adapter.targets=all", "train.lr=1e-3"),
    "int8": ("base.bits=8",),
}
"""Method -> settings, in the order in which they are measured."""
_SMALL = ("train.epochs=", "train.steps=2", "train.micro_batch=4", "data.seq_len=64")
_LEARNING_RATES = ("5e-4", "1e-3", "2e-3", "4e-3")


def measure_sst2(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Train and return the accuracies of the exported step on dev and test."""
    return _accuracies(cell, space, "sst2", "test")


def measure_rte(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Train and return the accuracy of the exported step on dev; RTE's test has no labels."""
    return _accuracies(cell, space, "rte", None)


def _accuracies(cell: Cell, space: Workspace, name: str, test: str | None) -> dict[str, Any]:
    run = f"runs/{name}-{cell.name.replace(', ', '-').replace(' ', '-')}-{cell.seed}"
    settings = [*cell.settings, f"train.seed={cell.seed}", *(_SMALL if space.small else ())]
    trained = space.train(name, run, *settings)
    folder = space.folder / run
    weights = folder / "adapter"
    result = {
        "dev_accuracy": trained["metrics"]["accuracy"],
        "best_step": trained["best_step"],
        "steps": trained["steps"],
        "peak_bytes": trained["ledger"]["measured_peak_bytes"],
        "checkpoint_bytes": folder_bytes(weights if weights.is_dir() else folder / "weights"),
    }
    if test:
        score = space.qlora("eval", run, "--data", f"{name}/{test}.tsv")
        result |= {"test_accuracy": score["accuracy"], "test_rows": score["rows"]}
    space.discard(run)
    return result


def measure_sweep(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Run `qlora sweep` on SST-2 with the cell's settings, and return its table.

    It is resumed if it was stopped. The setting `seeds` is the number of seeds.
    """
    folder = f"runs/sweep-{cell.name.replace(' ', '-')}"
    settings = [setting for setting in cell.settings if not setting.startswith("seeds=")]
    words = ["recipes/paper/sst2.yaml", *settings, "--seeds", cell.options()["seeds"]]
    words += [f"output={folder}", *(_SMALL if space.small else ("train.epochs=1",))]
    if (space.folder / folder / "sweep.json").is_file():
        space.is_resumed = True
        words.append("--resume")
    result = space.qlora("sweep", *words)
    space.discard(folder)
    kept = ("settings", "seeds", "mean", "spread", "status")
    return {
        "metric": result["metric"],
        "table": [{key: row[key] for key in kept} for row in result["table"]],
    }


def _cells(minutes: float) -> tuple[Cell, ...]:
    """Return the methods with one seed each, and then the other seeds."""
    seeded = [
        Cell(name, settings, minutes=minutes).with_seeds(SEEDS)
        for name, settings in _METHODS.items()
    ]
    return tuple(cell for group in zip(*seeded, strict=True) for cell in group)


SST2 = Experiment("sst2", ("minilm", "sst2"), _cells(9.0), _cells(1.0)[:1], measure_sst2)
RTE = Experiment("rte", ("minilm", "rte"), _cells(6.0), _cells(1.0)[:1], measure_rte)
_PARAMETERS = (  # The same number of trained parameters: rank x number of matrices of a block.
    ("q", "8"),
    ("v", "8"),
    ("q,v", "4"),
    ("q,k,v,o", "2"),
)
MATRICES = Experiment(
    "matrices",
    ("minilm", "sst2"),
    (
        *(
            Cell(
                f"matrices {targets}",
                (f"adapter.targets=[{targets}]", f"adapter.rank={rank}", "seeds=2"),
                minutes=6.0,
            )
            for targets, rank in _PARAMETERS
        ),
        Cell(
            "rank",
            ("adapter.rank=1,2,4,8,64", "adapter.targets=[q];[q,v];[q,k,v,o]", "seeds=1"),
            minutes=45.0,
        ),
        Cell("learning rate", (f"train.lr={','.join(_LEARNING_RATES)}", "seeds=1"), minutes=12.0),
    ),
    (Cell("rank", ("adapter.rank=1,2", "adapter.targets=[q]", "seeds=1")),),
    measure_sweep,
)
