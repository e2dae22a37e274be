"""Trains, evaluates, merges and verifies a model in less address space than its packed base has.

python tools/validation/address_space.py FOLDER [--layers N] [--width 2048] [--vocab 32000]
    [--bits 16] [--share 0.9] [--json FILE]

A Llama of `--layers` blocks with random values is written to FOLDER, whose rows and tokenizer are
those of the starter, with `base.residency: disk`. Each command runs in a fork of a process that has
imported everything: RLIMIT_AS is set to the address space that the fork has then plus `--share` of
the size of the packed base. With `base.residency: device` the same limit must stop the training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from large_base import LargeModel

from qlora_cli.files.locate import find_base

SHARD_BYTES = 10**9
CONTROL = "train on the device"
_NF4_BITS = 4.127
"""Bits of a weight in NF4 with double quantization: 4, one byte of a scale per 64, and its own."""
CHILD = """
import json, os, resource, sys, time
from pathlib import Path
import bitsandbytes, matplotlib.pyplot, pandas, torch, transformers.models.llama.modeling_llama
import qlora_cli.data.processes, qlora_cli.ui.report, qlora_cli.ui.tables
import qlora_cli.jobs.evaluate, qlora_cli.jobs.merge, qlora_cli.jobs.train, qlora_cli.jobs.verify
from qlora_cli.cli.main import run


def pages(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def limited(words, allowance, errors):
    with open(errors, "wb") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    begin = pages("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (begin + allowance,) * 2)
    began = time.monotonic()
    code = run(words)
    used = pages("VmPeak") - begin
    figures = {"code": code, "address_space_bytes": used, "resident_bytes": pages("VmHWM")}
    Path(errors + ".json").write_text(
        json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)})
    )


torch.set_num_threads(1)
allowance, folder = int(sys.argv[1]), sys.argv[2]
for number, words in enumerate(json.loads(sys.argv[3])):
    if not os.fork():
        try:
            limited(words, allowance, f"{folder}/command-{number}")
        finally:
            os._exit(0)
    os.wait()
"""
"""Runs commands one after the other: those of argument 3, under the limit of argument 1."""


def run_limited(folder: Path, allowance: int, commands: Mapping[str, Any]) -> dict[str, Any]:
    """Run commands under the limit, and return the exit code and the figures of each.

    A command that failed has the end of its messages, too.
    """
    settings = {"OMP_NUM_THREADS": "1", "QLORA_CACHE": str(folder / "c")}
    # glibc and Arrow reserve a gigabyte of addresses that they do not use, and glibc keeps freed
    # memory between memory that is in use, unless each large tensor is mapped by itself.
    settings |= {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    settings |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    words = [list(map(str, command)) for command in commands.values()]
    subprocess.run(
        [sys.executable, "-c", CHILD, str(allowance), str(folder), json.dumps(words)],
        env={**os.environ, **settings},
        check=True,
    )
    results = {}
    for number, name in enumerate(commands):
        shown = folder / f"command-{number}"
        figures = shown.with_name(f"{shown.name}.json")
        results[name] = json.loads(figures.read_text()) if figures.exists() else {"code": None}
        if results[name]["code"] != 0:
            results[name]["error"] = shown.read_text(errors="replace")[-1500:]
    return results


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


def validate(folder: Path, model: LargeModel, bits: int, share: float) -> dict[str, Any]:
    """Return the figures of all commands, and whether each ended as it must.

    folder: is created. share: of the packed base, which is added to the address space.
    """
    model.write(folder / "base", SHARD_BYTES)
    for file in find_base("starter", None).glob("*token*"):
        shutil.copy(file, folder / "base")
    in_blocks = model.block_weights * (bits if bits > 4 else _NF4_BITS) / 8
    packed_bytes = int(2 * model.table_weights + in_blocks)
    allowance = int(share * packed_bytes)
    recipe, run, out = write_recipe(folder, bits), folder / "run", folder / "merged"
    resident = ("base.residency=device", "base.cache=false", f"output={folder / 'resident'}")
    commands = {
        CONTROL: ("train", recipe, *resident),
        "train": ("train", recipe),
        "eval": ("eval", run, "--data", folder / "rows.jsonl", "--json"),
        "merge": ("merge", run, "--out", out),
        "verify": ("verify", out, "--against", run),
    }
    results = run_limited(folder, allowance, commands)
    others = [result["code"] for name, result in results.items() if name != CONTROL]
    return {
        "passed": results[CONTROL]["code"] not in (0, None) and not any(others),
        "weights": model.table_weights + model.block_weights,
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
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = LargeModel(given.layers, given.width, 11 * given.width // 4, given.vocab)
    result = validate(given.folder, model, given.bits, given.share)
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
