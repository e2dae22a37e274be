"""Time of `qlora generate` next to transformers' own `generate`, in 16 and in 4 bit.

    python tools/benchmarks/bench_generate.py MODEL --out tools/measurements/generate_cpu.json

MODEL is a folder of a model. Each round generates the same number of tokens greedily with

- `transformers`: `AutoModelForCausalLM` in the compute dtype of `qlora generate`
- `model`: what `qlora generate MODEL` opens
- `16 bit`: what `qlora generate MODEL --adapter NAME=DIR` opens, without an adapter
- `4 bit`: the base of a run with base.bits=4, without an adapter

one after the other. The result is the ratio to `transformers` of the same round. On a CPU the clock
is the processor time of one thread, on a GPU it is wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.record import versions
from qlora_cli.memory.device import inspect_device, profile_of
from qlora_cli.models.attach import remove_adapter
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.open import open_any, open_for_adapters

PROMPT_TOKENS = 32


def open_models(folder: Path, device: torch.device) -> dict[str, Any]:
    """Return name -> transformers model, ready for inference."""
    opened = open_any(str(folder), device, Silent())
    dtype = opened.loaded.weight_format.compute
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    packed = open_for_adapters(str(folder), device, Silent())
    return {
        "transformers": plain,
        "model": opened.loaded.model,
        "16 bit": packed.loaded.model,
        "4 bit": open_4_bit(folder, device, str(dtype).removeprefix("torch.")),
    }


def open_4_bit(folder: Path, device: torch.device, compute: str) -> Any:
    """Return the model with an NF4 base and without an adapter."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "base": {"bits": 4, "compute_dtype": compute},
            "data": {"train": ""},
            "train": {"activation_checkpointing": False},
        }
    )
    config = read_config(folder / "config.json")
    loaded = build(
        ModelRequest(
            recipe,
            config,
            lambda _, family: open_source(folder, family),
            device,
            profile_of(device),
        )
    )
    remove_adapter(loaded)
    loaded.model.eval().requires_grad_(False)
    loaded.model.config.use_cache = True
    return loaded.model


def now(device: torch.device) -> float:
    """Return the seconds of the clock that the top of the file names."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def seconds(model: Any, tokens: int, device: torch.device) -> float:
    """Return the time of one greedy generation of exactly `tokens` tokens."""
    ids = torch.arange(3, 3 + PROMPT_TOKENS, device=device)[None]
    begin = now(device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    assert output.shape[1] == PROMPT_TOKENS + tokens
    return now(device) - begin


def measure(models: dict[str, Any], tokens: int, rounds: int, device: torch.device) -> Any:
    """Return the median seconds of each model, and its median ratio to transformers."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds(model, 2, device)
    for _ in range(rounds):
        for name, model in models.items():
            taken[name].append(seconds(model, tokens, device))
    base = taken["transformers"]
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
        }
        for name, values in taken.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    profile = inspect_device()
    device = torch.device(profile.kind)
    words = sys.argv[1:] if arguments is None else arguments
    models = open_models(options.model, device)
    content = {
        "command": shlex.join(["python", "tools/benchmarks/bench_generate.py", *words]),
        "device": {"kind": profile.kind, "name": profile.name},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": options.tokens,
        "compute": str(models["transformers"].dtype),
        "generate": measure(models, options.tokens, options.rounds, device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)
    print(json.dumps(content["generate"], indent=1))


if __name__ == "__main__":
    main()
