"""Time of `qlora generate` next to transformers' own `generate` of the same weights.

    python tools/benchmarks/bench_generate.py MODEL --out tools/measurements/generate_cpu.json

MODEL is a folder of a model. Three pairs generate the same number of tokens greedily:

- `16 bit`: `qlora generate MODEL`, and transformers' model
- `16 bit, adapter`: `qlora generate MODEL --adapter NAME=DIR`, and transformers' model with PEFT
- `4 bit, adapter`: `qlora generate RUN` of a run with base.bits=4, and transformers' model in NF4
  of bitsandbytes with PEFT

All of them compute in the dtype of `qlora generate MODEL`. The adapter has random values; its rank
and its targets are options. The models of all pairs take turns in every round, and a ratio is that
of the medians. `to_plain` is the ratio to transformers' model in 16 bit without an adapter.
`same_tokens` is the number of leading tokens that are equal in a pair. On a CPU the clock is the
processor time of one thread, on a GPU it is wall-clock time. Needs peft.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft import __version__ as peft_version
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.open_generator import open_generator
from qlora_cli.jobs.record import versions
from qlora_cli.memory.device import inspect_device, profile_of
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.inference import prepare_generation
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.recipe.schema import Recipe

PROMPT_TOKENS = 32
PLAIN = "16 bit"


def open_4_bit(recipe: Recipe, device: torch.device, folder: Path) -> Any:
    """Return the model that training with `recipe` gives, with random B, and save its adapter."""
    base = Path(recipe.model.name)
    loaded = build(
        ModelRequest(
            recipe,
            read_config(base / "config.json"),
            lambda _, family: open_source(base, family),
            device,
            profile_of(device),
        )
    )
    torch.manual_seed(0)
    for _, layer in adapted_layers(loaded.model):
        for b in layer.lora_b.values():
            b.data.normal_(std=0.003)
    save_adapter(loaded, recipe, folder)
    loaded.model.eval().requires_grad_(False)
    loaded.model.config.use_cache = True
    prepare_generation(loaded, device, Silent())
    return loaded.model


def open_pairs(
    base: Path, adapter: dict[str, Any], device: torch.device
) -> dict[str, tuple[Any, Any]]:
    """Return name -> (transformers' model, the model of `qlora generate`)."""
    plain = open_generator(str(base), Silent()).opened.loaded
    dtype = plain.base_format.compute
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )

    def theirs(**more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device, **more)

    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "base": {"bits": 4, "compute_dtype": str(dtype).removeprefix("torch.")},
            "adapter": adapter,
            "data": {"train": ""},
            "train": {"activation_checkpointing": False},
        }
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        packed = open_4_bit(recipe, device, folder)
        generator = open_generator(str(base), Silent(), {"adapter": folder})
        generator.switch.use("adapter")
        return {
            PLAIN: (theirs().eval(), plain.model),
            "16 bit, adapter": (
                PeftModel.from_pretrained(theirs(), folder).eval(),
                generator.opened.loaded.model,
            ),
            "4 bit, adapter": (
                PeftModel.from_pretrained(theirs(quantization_config=nf4), folder).eval(),
                packed,
            ),
        }


def now(device: torch.device) -> float:
    """Return the seconds of the clock that the top of the file names."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(model: Any, tokens: int, device: torch.device) -> tuple[float, Tensor]:
    """Return (seconds, token ids) of one greedy generation of exactly `tokens` tokens."""
    ids = torch.arange(3, 3 + PROMPT_TOKENS, device=device)[None]
    begin = now(device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    seconds = now(device) - begin
    assert output.shape[1] == PROMPT_TOKENS + tokens
    return seconds, output[0, PROMPT_TOKENS:]


def measure(
    pairs: dict[str, tuple[Any, Any]], tokens: int, rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return for each pair the median seconds, their ratios and the equal tokens."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in pairs}
    same = {}
    for pair in pairs.values():
        for model in pair:
            generate(model, 2, device)
    for _ in range(rounds):
        for name, pair in pairs.items():
            ids = []
            for model, seconds in zip(pair, taken[name], strict=True):
                second, output = generate(model, tokens, device)
                seconds.append(second)
                ids.append(output)
            same[name] = int((ids[0] == ids[1]).int().cumprod(0).sum())
    plain = statistics.median(taken[PLAIN][0])
    found = {}
    for name, (theirs, ours) in taken.items():
        medians = statistics.median(theirs), statistics.median(ours)
        found[name] = {
            "transformers_seconds": medians[0],
            "qlora_seconds": medians[1],
            "ratio": medians[1] / medians[0],
            "to_plain": medians[1] / plain,
            "same_tokens": same[name],
            "all_transformers_seconds": theirs,
            "all_qlora_seconds": ours,
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default="all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    profile = inspect_device()
    device = torch.device(profile.kind)
    words = sys.argv[1:] if arguments is None else arguments
    adapter = {"rank": options.rank, "alpha": 2.0 * options.rank, "targets": options.targets}
    pairs = open_pairs(options.model, adapter, device)
    load = os.getloadavg()[0]
    content = {
        "command": shlex.join(["python", "tools/benchmarks/bench_generate.py", *words]),
        "device": {"kind": profile.kind, "name": profile.name},
        "cores": os.cpu_count(),
        "load_average": load,
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "peft": peft_version},
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "adapter": adapter,
        "compute": str(pairs[PLAIN][0].dtype),
        "pairs": measure(pairs, options.tokens, options.rounds, device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)
    print(json.dumps(content["pairs"], indent=1))


if __name__ == "__main__":
    main()
