"""Time and memory of loading a base: without a packed copy, with writing one, and from the copy.

    python tools/benchmarks/bench_load.py MODEL ... --out tools/measurements/load_cpu.json

MODEL is the folder of a model. For each of them and each number of bits, the base is loaded in
turns, `--rounds` times:

- `packed`: the checkpoint is packed, and no copy is kept (`base.cache: false`)
- `first`: the checkpoint is packed and the copy is written
- `second`: the copy is mapped and its checksums are compared

The cache is an empty folder in `--folder`. `seconds` are medians of wall-clock time, with all files
in the system's file cache; `anonymous_bytes` is the memory of the process that is no mapped file,
added by the loaded model. The ratio is packed / second.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.files.atomic import write_json
from qlora_cli.files.source import fingerprint, weights_bytes
from qlora_cli.jobs.prepare import prepare
from qlora_cli.jobs.record import versions
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.models.build import build
from qlora_cli.recipe.schema import Recipe


def load(model: Path, bits: int, keeps_copy: bool) -> Any:
    """Return the loaded model of a training job."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(model)},
            "base": {"bits": bits, "cache": keeps_copy},
            "data": {"train": "none"},
        }
    )
    profile = inspect_device()
    return build(prepare(recipe, profile).request(torch.device(profile.kind), Silent()))


def anonymous_bytes() -> int:
    """Return the memory of this process that is not mapped from a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measured(run: Callable[[], Any]) -> tuple[float, int]:
    """Return (seconds of a call, bytes of anonymous memory that its result adds)."""
    gc.collect()
    return_freed_memory()
    before, began = anonymous_bytes(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - began
    gc.collect()
    return_freed_memory()
    added = anonymous_bytes() - before
    del result
    return seconds, added


def compare(model: Path, bits: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one model in one format. folder: of the cache."""
    copies = folder / cache.PACKED
    taken: dict[str, list[tuple[float, int]]] = {"packed": [], "first": [], "second": []}
    for _ in range(rounds):
        shutil.rmtree(copies, ignore_errors=True)
        for name, results in taken.items():
            results.append(measured(partial(load, model, bits, name != "packed")))
    (entry,) = (entry for entry in cache.entries() if entry.kind == cache.PACKED)
    seconds = {name: statistics.median(s for s, _ in found) for name, found in taken.items()}
    return {
        "model": model.name,
        "bits": bits,
        "checkpoint_bytes": weights_bytes(model),
        "copy_bytes": entry.bytes,
        "seconds": seconds,
        "ratio": seconds["packed"] / seconds["second"],
        "anonymous_bytes": {
            name: statistics.median(added for _, added in found) for name, found in taken.items()
        },
        "all_seconds": {name: [s for s, _ in found] for name, found in taken.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models of the command line and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder of the cache; a temporary one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    profile, average = inspect_device(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ[cache.SWITCH] = folder
        rows = []
        for model in options.models:
            fingerprint(model)  # Known to every start after the first.
            for bits in options.bits:
                rows.append(compare(model, bits, options.rounds, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": shlex.join(["python", "tools/benchmarks/bench_load.py", *map(_name, words)]),
        "device": {"kind": profile.kind, "name": profile.name},
        "cores": os.cpu_count(),
        "load_average": average,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rounds": options.rounds,
        "loads": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)


def _name(word: str) -> str:
    """Return an argument without the folders of a path outside of the checkout."""
    return Path(word).name if Path(word).is_absolute() else word


if __name__ == "__main__":
    main()
