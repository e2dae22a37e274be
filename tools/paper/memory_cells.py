"""Experiment `memory`: trained parameters, checkpoint bytes and peaks of each method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper_cells import Cell, Experiment, Workspace, folder_bytes

SHAPE, LARGE_SHAPE = "gpt2-medium", "gpt3-175b"
"""Names of configs: of the measured model, which gets random weights, and of the planned one."""
LARGE_CELLS = {
    "GPT-3 175B": ("device", "400GiB"),
    "GPT-3 175B, base in host memory": ("host", "80GiB"),
}
"""Names of the planned cells -> where the base is, and the memory of the planned GPU."""
_FULL = ("adapter.method=full",)
_METHODS = {
    "full": _FULL,
    "lora": (),
    "int8": ("base.bits=8",),
    "nf4": ("base.bits=4",),
}
_RECOMPUTED = ("train.activation_checkpointing=true",)
_SMALL_SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 256}


def measure(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Plan the cell, and train it for two steps if it is not the large shape."""
    if cell.name in LARGE_CELLS:
        return _planned(cell, space)
    _make_model(space)
    words = ["recipes/paper/memory.yaml", *cell.settings]
    plan = space.qlora("plan", *words)
    run = f"runs/memory-{cell.name.replace(' ', '-').replace(',', '')}"
    ledger = space.train("memory", run, *cell.settings)["ledger"]
    folder = space.folder / run
    weights = folder / "adapter"
    result = {
        "total_parameters": plan["total_parameters"],
        "trainable_parameters": plan["trainable_parameters"],
        "checkpoint_bytes": folder_bytes(weights if weights.is_dir() else folder / "weights"),
        "planned_peak_bytes": ledger["planned_peak_bytes"],
        "measured_peak_bytes": ledger["measured_peak_bytes"],
        "at_peak": ledger["after"]["at_peak"],
    }
    space.discard(run)
    return result


def _planned(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Return the plan of every method for the large shape; nothing is loaded."""
    words = ["recipes/paper/gpt3.yaml", *cell.settings]
    words += ["--vram", LARGE_CELLS[cell.name][1], "--compare"]
    plan = space.qlora("plan", *words)
    kept = ("total_parameters", "trainable_parameters", "adapter_bytes", "arithmetic", "compare")
    return {key: plan[key] for key in kept}


def _make_model(space: Workspace) -> Path:
    """Write a model of the measured shape with random weights in 16 bit, if it is absent."""
    folder = space.folder / SHAPE
    if folder.is_dir():
        return folder
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    content = json.loads((space.folder / f"{SHAPE}.json").read_text())
    if space.small:
        content |= _SMALL_SHAPE
    torch.manual_seed(0)
    part = folder.with_suffix(".part")
    GPT2LMHeadModel(GPT2Config.from_dict(content)).half().save_pretrained(part)
    part.rename(folder)
    return folder


_CELLS = tuple(
    Cell(f"{name}, recomputed" if recomputed else name, (*settings, *recomputed), minutes=2.0)
    for recomputed in ((), _RECOMPUTED)
    for name, settings in _METHODS.items()
)
MEMORY = Experiment(
    "memory",
    ("memory", SHAPE, LARGE_SHAPE),
    (
        *(
            Cell(name, (f"base.residency={where}",), minutes=4.0)
            for name, (where, _) in LARGE_CELLS.items()
        ),
        *_CELLS,
    ),
    (_CELLS[0], _CELLS[3]),
    measure,
)
