"""Plans a base in host memory: peaks of three models, and the longest row on three GPUs.

python tools/validation/streamed_plans.py [FILE.json]

Every case is NF4 with rank 16 on all linears and recomputes every block. The device is planned
(`qlora plan --vram`): nothing is measured on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plan_cases import Case
from transformers import AutoConfig

from qlora_cli.plan.advise import longest_sequence
from qlora_cli.plan.planner import Planner
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.gpus import planned_gpu
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe

_QWEN3_32B = {
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
LEAN = {"update_in_backward": True, "max_grad_norm": None, "offload_inputs": True}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw", **LEAN},
    {"optimizer": "adamw8bit"},
    {"optimizer": "adamw8bit", **LEAN},
)
"""Settings of `train` that decide what the training itself needs."""
GPUS = ("8GiB", "12GiB", "24GiB")
PEAK_TOKENS = 512


def configs() -> dict[str, Any]:
    """Return name -> transformers' config of each model."""
    return {
        "Llama 3 8B": Case("llama", "8B").config(),
        "Qwen3 32B": AutoConfig.for_model("qwen3", **_QWEN3_32B),
        "Llama 3 70B": Case("llama", "70B").config(),
    }


def recipe_of(settings: Mapping[str, Any], residency: str = "host") -> Recipe:
    """Return the recipe of a case. settings: of `train`."""
    return Recipe.model_validate(
        {
            "model": {"name": "planned"},
            "base": {"residency": residency},
            "adapter": {"rank": 16, "targets": "all"},
            "data": {"train": "none", "seq_len": PEAK_TOKENS},
            "train": {"activation_checkpointing": True, "grad_accum": 1, **settings},
        }
    )


def peaks(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the planned peak of one row of 512 tokens, on the device and in host memory."""
    gpu = planned_gpu("80GiB")
    for settings, residency in [*((s, "host") for s in SETTINGS), (SETTINGS[0], "device")]:
        recipe, _ = resolve(recipe_of(settings, residency), gpu)
        plan = Planner(config, gpu).plan(recipe)
        largest = max(plan.phases, key=lambda phase: phase.peak_bytes)
        yield {
            "settings": settings,
            "residency": residency,
            "peak_bytes": plan.peak_bytes,
            "reserved_bytes": plan.reserved_bytes,
            "copied_bytes": plan.copied_bytes,
            "at_peak": {name: size for name, size in largest.at_peak.items() if size},
        }


def lengths(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the longest row that fits each GPU, at most the model's positions."""
    for size in GPUS:
        gpu = planned_gpu(size)
        for settings in SETTINGS:
            recipe, _ = resolve(recipe_of(settings), gpu)
            recipe = with_settings(recipe, "train", loss_chunk=64)
            planner = Planner(config, replace(gpu, is_planned=True))
            longest = longest_sequence(recipe, planner, config.max_position_embeddings)
            yield {"gpu": size, "settings": settings, "tokens": longest}


def main() -> None:
    """Print one line per result, and write all to the file that is named."""
    results: dict[str, Any] = {
        "command": "python tools/validation/streamed_plans.py",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "models": {},
    }
    for name, config in configs().items():
        found: dict[str, Any] = {"peaks": [], "lengths": []}
        results["models"][name] = found
        for key, rows in (("peaks", peaks(config)), ("lengths", lengths(config))):
            for row in rows:
                found[key].append(row)
                print(name, key, row, flush=True)
                if len(sys.argv) > 1:
                    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
