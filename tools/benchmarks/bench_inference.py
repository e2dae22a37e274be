"""What several adapters on one base cost: bytes, the time of a switch, the latency of an answer.

    python tools/benchmarks/bench_inference.py --out tools/measurements/inference_cpu.json

Makes a Llama with random weights and two adapters on it, in a temporary folder, and opens them as
`qlora generate MODEL --adapter NAME=DIR` does. Latency is measured in pairs: every round times the
base, the base a second time, the merged model and the unmerged adapter, one after the other and
each round beginning with another one; the result is the ratio to the base
of the same round. The base against itself shows how much such a ratio varies by chance.

On a CPU the clock is the processor time of the one thread that computes: what an idle machine's
clock would show, without other programs' turns, and without waiting for a disk (a merged switch
reads the base's file, which the system still holds). On a GPU it is wall-clock time.

Source of the claim: Hu et al. 2021 (LoRA), section 4.1: merged, there is no added latency.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.record import versions
from qlora_cli.memory.device import inspect_device, profile_of
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.models.switch import BASE, AdapterSwitch
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.open import open_for_adapters
from qlora_cli.runs.run import adapter_at

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
    "70m": {
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": 12,
        "vocab_size": 8192,
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "q and v, rank 8": {"rank": 8, "alpha": 16.0, "targets": ["q", "v"]},
    "all linears, rank 16": {"rank": 16, "alpha": 32.0, "targets": "all"},
}
STATES = ("base", "base again", "merged", "unmerged")
PROMPTS_A_TURN = 3
"""Prompts read each time; their median counts, as that of the tokens does."""


def make_model(folder: Path, size: str) -> Path:
    """A Llama of this size with random weights, in 16 bit."""
    config = LlamaConfig(**SHAPES[size], num_attention_heads=8, max_position_embeddings=1024)
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """An adapter with B not zero, as training leaves it."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(model)},
            "base": {"bits": 16, "compute_dtype": "float32"},
            "adapter": settings,
            "data": {"train": ""},
            "train": {"activation_checkpointing": False},
        }
    )
    config = read_config(model / "config.json")
    device = torch.device("cpu")
    loaded = build(
        ModelRequest(
            recipe, config, lambda _, family: open_source(model, family), device, profile_of(device)
        )
    )
    for _, layer in adapted_layers(loaded.model):
        for b in layer.lora_b.values():
            torch.nn.init.normal_(b, std=0.01)
    save_adapter(loaded, recipe, folder)
    return folder


class Bench:
    """One opened model with its adapters, beside the weights and merged into them."""

    def __init__(self, model: Path, adapters: dict[str, Path], batch: int = 1) -> None:
        """Opens a model with its adapters. batch: prompts that are answered together."""
        facts = inspect_device()
        self.batch = batch
        self.device = torch.device(facts.kind)
        opened = open_for_adapters(str(model), self.device, Silent())
        self.loaded: LoadedModel = opened.loaded
        source = open_source(opened.weights, self.loaded.family)
        self.beside = AdapterSwitch(self.loaded, source)
        self.module_scope = AdapterSwitch(self.loaded, source, merged=True)
        for name, folder in adapters.items():
            for switch in (self.beside, self.module_scope):
                switch.add(name, adapter_at(folder))

    def enter(self, state: str, name: str) -> None:
        """Makes the model answer in one of the STATES."""
        self.module_scope.use(name if state == "merged" else BASE)
        if state != "merged":
            self.beside.use(name if state == "unmerged" else BASE)

    @torch.no_grad()
    def read_prompt(self, num_tokens: int) -> tuple[float, Any]:
        """(seconds for the prompt, its cache)."""
        ids = torch.arange(num_tokens, device=self.device).expand(self.batch, -1) % 61
        begin = self.now()
        out = self.loaded.model(ids, use_cache=True, logits_to_keep=1)
        return self.now() - begin, out.past_key_values

    @torch.no_grad()
    def decode(self, num_tokens: int, cache: Any) -> list[float]:
        """Seconds of each token behind a prompt, one token at a time."""
        token = torch.ones(self.batch, 1, dtype=torch.long, device=self.device)
        taken = []
        for _ in range(num_tokens):
            begin = self.now()
            out = self.loaded.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            taken.append(self.now() - begin)
            cache = out.past_key_values
        return taken

    def answer(self, prompt: int, tokens: int) -> tuple[float, float]:
        """(seconds of the prompt, seconds a token), medians: other processes move means more."""
        self.decode(2, self.read_prompt(prompt)[1])  # Weights just put in place are in no cache.
        read = [self.read_prompt(prompt) for _ in range(PROMPTS_A_TURN)]
        seconds = statistics.median(taken for taken, _ in read)
        return seconds, statistics.median(self.decode(tokens, read[-1][1]))

    def now(self) -> float:
        """Seconds, by the clock that the file's head names."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def sizes(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    """What the adapter adds: on the disk, and in memory once it is loaded."""
    bench.enter("unmerged", name)
    added = [p for _, layer in adapted_layers(bench.loaded.model) for p in _factors(layer)]
    bench.enter("base", name)
    base_bytes = sum(p.nbytes for p in bench.loaded.model.parameters())
    memory_bytes = sum(p.nbytes for p in added)
    return {
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "memory_bytes": memory_bytes,
        "parameters": sum(p.numel() for p in added),
        "base_memory_bytes": base_bytes,
        "share_of_base": memory_bytes / base_bytes,
    }


def _factors(layer: Any) -> list[torch.Tensor]:
    return [*layer.lora_a.values(), *layer.lora_b.values()]


def switches(bench: Bench, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of a switch from one adapter to another, there and back."""
    found = {}
    for kind, switch in (("unmerged", bench.beside), ("merged", bench.module_scope)):
        taken = []
        for name in [*names] * (rounds + 1):
            begin = bench.now()
            switch.use(name)
            taken.append(bench.now() - begin)
        switch.use(BASE)
        found[kind] = spread(taken[len(names) :])
    return found


def latencies(
    bench: Bench,
    name: str,
    rounds: int,
    prompt: int,
    tokens: int,
    states: Sequence[str] = STATES,
) -> dict[str, Any]:
    """Ratios to the base of the same round, and the base's own seconds.

    states: what `bench.enter` takes; the first one is the base.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        what: {state: [] for state in states} for what in ("prompt", "token")
    }
    for turn in range(rounds + 1):
        for place in range(len(states)):
            state = states[(turn + place) % len(states)]
            bench.enter(state, name)
            for what, taken in zip(seconds, bench.answer(prompt, tokens), strict=True):
                seconds[what][state].append(taken)
    bench.enter("base", name)
    return {what: _ratios(taken) for what, taken in seconds.items()}


def _ratios(taken: dict[str, list[float]]) -> dict[str, Any]:
    """The first round warmed the machine up and is left out."""
    base = taken["base"][1:]
    ratios = {
        f"{state} / base": spread([a / b for a, b in zip(taken[state][1:], base, strict=True)])
        for state in taken
        if state != "base"
    }
    return {"base_seconds": spread(base), **ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and how many."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high, "num": len(values)}


def measure(arguments: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as it is written to the file."""
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "model", arguments.size)
        folders = {
            name: make_adapter(model, Path(place) / str(number), settings)
            for number, (name, settings) in enumerate(ADAPTERS.items())
        }
        note("model and adapters are made")
        bench = Bench(model, folders)
        adapters = {name: sizes(bench, name, folder) for name, folder in folders.items()}
        switching = switches(bench, list(folders), arguments.rounds)
        note("switches are timed")
        latency = {}
        for name in folders:
            latency[name] = latencies(
                bench, name, arguments.rounds, arguments.prompt, arguments.tokens
            )
            note(f"latency with {name} is timed")
    return {
        "model": {
            "shape": SHAPES[arguments.size],
            "parameters": sum(p.numel() for p in bench.loaded.model.parameters()),
            "weights": str(bench.loaded.base_format.storage),
            "compute": str(bench.loaded.base_format.compute),
        },
        "adapters": adapters,
        "switch_seconds": switching,
        "latency": latency,
    }


def where() -> dict[str, Any]:
    """The machine and what ran on it."""
    facts = inspect_device()
    return {
        "device": {"kind": facts.kind, "name": facts.name, "capacity_bytes": facts.capacity_bytes},
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measures and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="70m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the answer")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of the answer")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)  # Or the processor's time would be that of several threads.
    command_words = sys.argv[1:] if words is None else words
    content = {
        "command": shlex.join(["python", "tools/benchmarks/bench_inference.py", *command_words]),
        **where(),
    }
    content |= measure(arguments, lambda text: print(text, file=sys.stderr))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, content)
    print(json.dumps(content["latency"], indent=1))


if __name__ == "__main__":
    main()
