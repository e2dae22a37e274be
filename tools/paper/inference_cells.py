"""Experiments `latency` and `tasks`: what an adapter costs when answers are computed.

Both use the model, the adapters and the clock of tools/benchmarks/bench_inference.py: a Llama with
random weights, the processor time of one thread, ratios to the base of the same round.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bench_inference
import torch
from bench_inference import Bench, latencies, make_adapter, make_model, sizes, switches
from houlsby import SequentialAdapters
from paper_cells import Cell, Experiment, Workspace

from qlora_cli.models.switch import BASE

LORA = {"rank": 8, "alpha": 16.0, "targets": ["q", "v"]}
SEQUENTIAL = "adapters in sequence"
STATES = (*bench_inference.STATES, SEQUENTIAL)
_ANSWER_TOKENS = 12


class BesideSequential(Bench):
    """The model with a LoRA adapter, and with adapters in sequence as a further state."""

    def __init__(self, model: Path, adapter: Path, batch: int, bottleneck: int) -> None:
        super().__init__(model, {"lora": adapter}, batch)
        blocks = self.loaded.model.model.layers
        modules = [part for block in blocks for part in (block.self_attn, block.mlp)]
        width = self.loaded.config.hidden_size
        self.sequential = SequentialAdapters(modules, width, bottleneck)
        self.sequential.layers.to(self.device, self.loaded.base_format.compute)

    def enter(self, state: str, name: str) -> None:
        """Makes the model answer in one of the STATES."""
        self.sequential.remove()
        super().enter("base" if state == SEQUENTIAL else state, name)
        if state == SEQUENTIAL:
            self.sequential.insert()


def measure_latency(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Time a prompt and a token of the answer in each state. Options: see `LATENCY`."""
    options = {key: int(value) for key, value in cell.options().items()}
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "model", "tiny" if space.small else "70m")
        adapter = make_adapter(model, Path(place) / "adapter", LORA)
        bench = BesideSequential(model, adapter, options["batch"], options["bottleneck"])
        taken = latencies(
            bench, "lora", options["rounds"], options["prompt"], _ANSWER_TOKENS, STATES
        )
        lora = sizes(bench, "lora", adapter)["parameters"]
    parameters = {"lora": lora, SEQUENTIAL: bench.sequential.num_parameters()}
    return {**taken, "parameters": parameters}


def measure_tasks(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Measure bytes per task and switches, and compare answers with those of each task alone."""
    options = {key: int(value) for key, value in cell.options().items()}
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "model", "tiny" if space.small else "70m")
        names = [f"task-{number}" for number in range(options["tasks"])]
        adapters = {name: make_adapter(model, Path(place) / name, LORA) for name in names}
        alone = [_logits(Bench(model, {name: adapters[name]}), name) for name in names]
        bench = Bench(model, adapters)
        base = _logits(bench, BASE)
        times = switches(bench, names, options["rounds"])
        together = [_logits(bench, name) for name in names]
        size = sizes(bench, names[0], adapters[names[0]])
        return {
            "tasks": len(names),
            "distinct_answers": len({tuple(logits.flatten().tolist()) for logits in alone}),
            "answers_unchanged": sum(map(torch.equal, alone, together)),
            "base_unchanged": torch.equal(base, _logits(bench, BASE)),
            "switch_seconds": times,
            **size,
        }


@torch.no_grad()
def _logits(bench: Bench, name: str) -> torch.Tensor:
    """Return the logits of the last token of a prompt, with the adapter beside the weights."""
    bench.beside.use(name)
    ids = torch.arange(16, device=bench.device)[None] % 61
    logits: torch.Tensor = bench.loaded.model(ids, logits_to_keep=1).logits.clone()
    bench.beside.use(BASE)
    return logits


LATENCY = Experiment(
    "latency",
    (),
    (
        Cell("batch 1", ("batch=1", "prompt=64", "bottleneck=8", "rounds=10"), minutes=3.0),
        Cell("batch 32", ("batch=32", "prompt=16", "bottleneck=8", "rounds=6"), minutes=6.0),
    ),
    (Cell("batch 1", ("batch=1", "prompt=4", "bottleneck=2", "rounds=2")),),
    measure_latency,
)
TASKS = Experiment(
    "tasks",
    (),
    (Cell("q and v, rank 8", ("tasks=10", "rounds=10"), minutes=2.0),),
    (Cell("q and v, rank 8", ("tasks=3", "rounds=2")),),
    measure_tasks,
)
