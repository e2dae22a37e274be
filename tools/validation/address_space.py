"""Trains, evaluates, merges and verifies a model in less address space than its packed base has.

python tools/validation/address_space.py FOLDER [--layers N] [--bits 16] [--share 0.6] [--json FILE]

A Llama of `--layers` blocks of 51 million weights with random values is written to FOLDER, with
`base.residency: disk`. Each command runs in a process of its own: after its imports, RLIMIT_AS is
set to the address space that the process has then plus `--share` of the size of the packed base.
With `base.residency: device` the same limit must stop the training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from qlora_cli.export.merge.folder import plan_shards, write_index
from qlora_cli.files.locate import find_base
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors

WIDTH, INNER, VOCAB = 2048, 5632, 32000
CHILD = """
import resource, sys
from pathlib import Path
import bitsandbytes, transformers.models.llama.modeling_llama
import qlora_cli.jobs.evaluate, qlora_cli.jobs.merge, qlora_cli.jobs.train, qlora_cli.jobs.verify
from qlora_cli.cli.main import run


def pages(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


limit = pages("VmSize") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
code = run(sys.argv[2:])
print(f"limit {limit} peak {pages('VmPeak')} resident {pages('VmHWM')}", file=sys.stderr)
sys.exit(code)
"""


def write_base(folder: Path, num_layers: int) -> int:
    """Write the model, one tensor at a time, and return its number of weights."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    for file in find_base("starter", None).glob("*token*"):
        shutil.copy(file, folder)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for layer in range(num_layers):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{role}_proj.weight": (WIDTH, WIDTH) for role in "qkvo"}
        shapes |= {f"{path}.mlp.{role}_proj.weight": (INNER, WIDTH) for role in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[f"{path}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{path}.post_attention_layernorm.weight"] = (WIDTH,)
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    torch.manual_seed(0)
    noise = (0.02 * torch.randn(INNER * WIDTH)).bfloat16()

    def make(name: str) -> Tensor:
        size = torch.Size(shapes[name])
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return noise.repeat(-(-size.numel() // noise.numel()))[: size.numel()].view(size)

    shards = plan_shards(specs, 10**9)
    for shard in shards:
        write_tensors(folder / shard.name, shard.shapes, make, {"format": "pt"})
    write_index(folder, shards)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def write_recipe(folder: Path, bits: int) -> Path:
    """Write rows and a recipe of two steps."""
    rows = [{"text": f"{number} and {number + 1} are {2 * number + 1}."} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"model: {{name: {folder / 'base'}}}",
        f"base: {{bits: {bits}, residency: disk}}",
        "adapter: {rank: 4, targets: [q, v]}",
        f"data: {{train: {folder / 'rows.jsonl'}, seq_len: 64}}",
        "train: {steps: 2, grad_accum: 1, activation_checkpointing: true, loss_chunk: 16}",
        f"output: {folder / 'run'}",
    ]
    recipe = folder / "recipe.yaml"
    recipe.write_text("\n".join(lines) + "\n")
    return recipe


def limited(folder: Path, allowance: int, *words: str) -> dict[str, Any]:
    """Run one command under the limit. Return its exit code, figures and the end of its stderr."""
    began = time.monotonic()
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "QLORA_CACHE": str(folder / "c")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(allowance), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
    )
    last = done.stderr.splitlines()[-1].split() if done.stderr else []
    figures = dict(zip(last[::2], map(int, last[1::2]), strict=True)) if "limit" in last else {}
    found: dict[str, Any] = {"code": done.returncode, "seconds": round(time.monotonic() - began, 1)}
    found |= {f"{name}_bytes": value for name, value in figures.items()}
    if done.returncode:
        found["error"] = done.stderr[-1500:]
    return found


def validate(folder: Path, num_layers: int, bits: int, share: float) -> dict[str, Any]:
    """Return the figures of all commands, and whether each ended as it must."""
    num_weights = write_base(folder / "base", num_layers)
    tables = 2 * 2 * VOCAB * WIDTH
    in_blocks = num_weights - 2 * VOCAB * WIDTH
    packed_bytes = int(tables + in_blocks * (bits / 8 if bits > 4 else 4.127 / 8))
    allowance = int(share * packed_bytes)
    recipe, run = str(write_recipe(folder, bits)), str(folder / "run")
    commands = {
        "train on the device": ("train", recipe, "base.residency=device", "base.cache=false"),
        "train": ("train", recipe),
        "eval": ("eval", run, "--data", str(folder / "rows.jsonl"), "--json"),
        "merge": ("merge", run, "--out", str(folder / "merged")),
        "verify": ("verify", str(folder / "merged"), "--against", run),
    }
    results: dict[str, Any] = {}
    for name, words in commands.items():
        results[name] = limited(folder, allowance, *words)
        print(name, results[name], flush=True)
        if name == "train on the device":
            shutil.rmtree(run, ignore_errors=True)
    codes = {name: result["code"] for name, result in results.items()}
    passed = codes.pop("train on the device") != 0 and not any(codes.values())
    return {
        "passed": passed,
        "weights": num_weights,
        "bits": bits,
        "packed_bytes": packed_bytes,
        "allowance_bytes": allowance,
        "commands": results,
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }


def main() -> None:
    """Validate, print the result, write it if a file is named, and exit with 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = validate(given.folder, given.layers, given.bits, given.share)
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
