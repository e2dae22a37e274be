"""Plan large models on 1, 2, 4 and 8 GPUs: placement, memory per device, bytes over the link.

    python tools/validation/scaling.py CONFIGS [--out FILE] [--models NAME ...]

CONFIGS: folder with a config.json per model, named NAME.json. Nothing is measured: memory is the
plan's, time is computed from published speeds. The result is the two tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.planned_length import estimated_time
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.speeds import LINK_EFFICIENCY, nominal_speed
from qlora_cli.recipe.gpus import planned_devices
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe

MODELS = ("Llama-3-8B", "Qwen3-32B", "Llama-3-70B", "Llama-3.1-405B")
COUNTS = (1, 2, 4, 8)
GRAD_ACCUM = 8


NVLINK: dict[str, float | None] = {"RTX 4090": None, "H100": 450e9}
"""GPU -> bytes per second and direction of its link to other GPUs by the specification (NVLink 4:
900 GB/s in both directions together); None if it is that to the host."""


@dataclass(frozen=True)
class Case:
    """A planned job. Bytes and seconds are those of one device in one optimizer step.

    adapter_bytes: of the complete adapter. own_adapter_bytes, gradient_bytes, optimizer_bytes: what
    the device has of them at the peak of a step, with buffers.
    """

    model: str
    gpu: str
    count: int
    placement: str | None
    reserved_bytes: int
    usable_bytes: int
    link_bytes: int = 0
    compute_seconds: float = 0.0
    link_seconds: float = 0.0
    bound: str = ""
    adapter_bytes: int = 0
    own_adapter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0


def recipe_of(placement: str) -> Recipe:
    """Return the recipe: NF4, rank 16 on all linears, 8 micro-batches of 1 x 1024 tokens."""
    return Recipe.model_validate(
        {
            "model": {"name": "planned"},
            "base": {"residency": placement},
            "adapter": {"rank": 16, "alpha": 32, "targets": "all"},
            "data": {"train": "rows.jsonl", "seq_len": 1024},
            "train": {"grad_accum": GRAD_ACCUM, "steps": 1, "activation_checkpointing": True},
        }
    )


def links(profile: DeviceProfile) -> tuple[float, float]:
    """Return the bytes per second of the links of a GPU to the host and to other GPUs."""
    host = nominal_speed(profile, torch.bfloat16).link_bytes_per_second
    specified = NVLINK[profile.name]
    return host, host if specified is None else LINK_EFFICIENCY * specified


def planned(model: str, config: Any, gpu: str, count: int) -> Case:
    """Return the job with the first placement that fits: device, shard, host."""
    profile = planned_devices(f"{count}x{gpu}")
    host_link, device_link = links(profile)
    smallest = 0
    for placement in ("device", "shard", "host"):
        if placement == "shard" and count == 1:
            continue
        recipe, _ = resolve(recipe_of(placement), profile)
        planner = Planner(config, profile)
        settled = planner.settle(recipe)
        plan, recipe = settled.plan, settled.recipe
        smallest = min(smallest or plan.needed_bytes, plan.needed_bytes)
        if not planner.fits(plan):
            continue
        own = GRAD_ACCUM // count
        # Gradients are added up and parameters exchanged: once per step, or if they are sharded,
        # once and twice per micro-batch.
        exchanges = 3 * own if placement == "shard" else 2
        trained_bytes = exchanges * plan.adapter_bytes * (count - 1) // count
        weights = 2 * plan.streamed_bytes * own
        link = host_link
        if placement == "shard":
            weights, link = weights * (count - 1) // count, device_link
        time = estimated_time(recipe, config, profile, plan, None)
        seconds = (time.copies.compute_seconds if time.copies else time.step_seconds) or 0.0
        link_seconds = weights / link + trained_bytes / device_link
        bound = "link" if link_seconds > seconds else "compute"
        shown = (plan.needed_bytes, profile.usable_bytes, trained_bytes + weights)
        step = next(phase for phase in plan.phases if phase.name == "step")
        own_bytes = (step.at_peak.get(name, 0) for name in ("adapter", "gradients", "optimizer"))
        trained = (plan.adapter_bytes, *own_bytes)
        return Case(model, gpu, count, placement, *shown, seconds, link_seconds, bound, *trained)
    return Case(model, gpu, count, None, smallest, profile.usable_bytes)


def row(case: Case) -> str:
    """Return a case as a row of a Markdown table."""
    start = f"| {case.model} | {case.count} x {case.gpu} |"
    needed = f"{case.reserved_bytes / 2**30:.1f} of {case.usable_bytes / 2**30:.1f} GiB"
    if case.placement is None:
        return f"{start} does not fit | {needed} | - | - | - | - |"
    return (
        f"{start} {case.placement} | {needed} | {case.link_bytes / 1e9:,.1f} GB | "
        f"{case.compute_seconds:.1f} s | {case.link_seconds:.1f} s | {case.bound} |"
    )


def trained_row(case: Case) -> str:
    """Return what the trained part of a case needs on each device, as a row of a Markdown table."""
    sizes = (
        case.adapter_bytes,
        case.own_adapter_bytes,
        case.gradient_bytes,
        case.optimizer_bytes,
    )
    texts = " | ".join(f"{size / 2**20:,.0f} MiB" for size in sizes)
    memory = f"{case.reserved_bytes / 2**30:.1f} GiB"
    return f"| {case.model} | {case.count} x {case.gpu} | {case.placement} | {texts} | {memory} |"


def config_of(file: Path) -> Any:
    """Return transformers' config in a file with any name."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.json"
        copy.write_text(file.read_text())
        return read_config(copy)


def main() -> None:
    """Plan every case, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", default=MODELS)
    given = parser.parse_args()
    cases = []
    for model in given.models:
        config = config_of(given.configs / f"{model}.json")
        for gpu in NVLINK:
            for count in COUNTS:
                cases.append(planned(model, config, gpu, count))
                print(row(cases[-1]), flush=True)
                if given.out is not None:
                    content = {"source": "planned", "cases": [asdict(case) for case in cases]}
                    given.out.write_text(json.dumps(content, indent=1) + "\n")
    for case in cases:
        if case.count > 1 and (case.placement == "shard" or case.gpu == "RTX 4090"):
            print(trained_row(case))


if __name__ == "__main__":
    main()
