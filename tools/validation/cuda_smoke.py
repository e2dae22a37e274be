"""Runs `qlora train` on CUDA to its end, in all settings, and checks what its ledger holds.

    python tools/validation/cuda_smoke.py [--out FILE.json] [--only REGEX] [--jobs 2]

Small models of every family with all bits, optimizers and methods for three steps, and an 8B model
for two (the first has no optimizer's states yet, and a plan is of the worst). Its checkpoint takes
no disk: the file is a hole, which is read tensor by tensor, so that weights are made on the spot.
Each job is the command itself in a process of its own. A witness in that process reads the caching
allocator's peaks each time before they are reset; it shares nothing with the job's instrument.

It proves that the road ends, that the run's folder is whole, that the ledger's figures are the
allocator's own, byte for byte, that the plan was within its bounds and that at least 99 % of each
peak is attributed. It needs no card: under a stand-in that only counts (the real allocator and the
real host code of torch and bitsandbytes, empty kernels) all of this is as true. What it shows there
is nothing of speed or of numbers: a loss is read as zero, kernels that a real card would choose
instead are not run, and 8 bit goes without outlier columns, because finding them needs a kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_facts import is_fake_gpu
from plan_cases import FILE_DTYPE, Case, MadeSource
from plan_measure import describe_machine
from plan_table import OVER, UNDER

from qlora_cli.cli import main as command
from qlora_cli.files.safetensors_io import Shape, write_tensors
from qlora_cli.files.source import SINGLE
from qlora_cli.memory.ledger import Ledger, peak_phase
from qlora_cli.models.build import skeleton
from qlora_cli.runs import finite
from qlora_cli.runs.layout import RunFolder

_NOT_FINITE = "not finite"
ATTRIBUTED = 0.99
"""Of each phase's peak, to a category that is not `other`."""
_ALL = "adapter.targets=all"
_INT8 = "base.bits=8" + (" base.outlier_threshold=0" if is_fake_gpu() else "")
_SETTINGS = (
    ("llama", ""),
    ("llama", f"{_ALL} train.activation_checkpointing=false"),
    ("llama", "base.double_quant=false base.quant_type=fp4 adapter.rslora=true"),
    ("llama", f"{_INT8} {_ALL}"),
    ("llama", f"base.bits=16 {_ALL}"),
    ("llama", "base.bits=16 adapter.method=full"),
    ("llama", f"base.compute_dtype=float32 {_ALL}"),
    ("llama", f"base.compute_dtype=float16 adapter.dtype=float16 {_ALL}"),
    ("llama", f"train.optimizer=adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"train.optimizer=paged_adamw adapter.rank=64 {_ALL}"),
    ("llama", f"train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"adapter.dropout=0.1 {_ALL}"),
    ("llama", "data.packing=false train.micro_batch=4"),
    ("mistral", _ALL),
    ("qwen2", f"{_ALL} {_INT8}"),
    ("qwen3", f"{_ALL} train.activation_checkpointing=false"),
    ("gpt2", _ALL),
    ("gpt2", _INT8),
    ("gpt2", "base.bits=16 adapter.method=full"),
)
"""Family and overrides, of the small shape."""


@dataclass(frozen=True)
class Road:
    """One job. hollow: its checkpoint is a hole of zeros."""

    case: Case
    steps: int = 3
    hollow: bool = False

    def words(self, place: Path) -> list[str]:
        """Of `qlora train`, after its base and its rows were written to this folder."""
        tokens = self.case.recipe().data.seq_len
        base = self._write_base(place / "base")
        rows = write_rows(place / "rows.jsonl", tokens, self.case.config().vocab_size)
        recipe = {
            "model": {"name": str(base)},
            "data": {"train": str(rows), "eval": str(rows), "seq_len": tokens},
            "train": {"steps": self.steps, "grad_accum": 2},
            "output": str(place / "run"),
        }
        # JSON is YAML.
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        return ["train", str(place / "recipe.yaml"), *self.case.changes, "--json"]

    def _write_base(self, folder: Path) -> Path:
        self.case.config().save_pretrained(folder)
        source = MadeSource(*skeleton(self.case.config(), FILE_DTYPE), touched=not self.hollow)
        file = folder / SINGLE
        if self.hollow:
            write_hollow(file, source)
        else:
            shapes = {name: Shape(FILE_DTYPE, source.shape(name)) for name in source.names()}
            write_tensors(file, shapes, source.read, {"format": "pt"})
        return folder


def roads() -> list[Road]:
    """Small ones in all settings, then 8B."""
    small = (
        Road(Case(family, "small", ("data.seq_len=256", *text.split()), 32000))
        for family, text in _SETTINGS
    )
    return [*small, Road(Case("llama", "8B", ("data.seq_len=2048", _ALL)), steps=2, hollow=True)]


def write_hollow(file: Path, source: MadeSource) -> None:
    """A safetensors file of zeros that takes no disk: a header and a hole."""
    header: dict[str, Any] = {}
    end = 0
    for name in source.names():
        start, shape = end, source.shape(name)
        end += FILE_DTYPE.itemsize * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(stream.tell() + end)


def write_rows(file: Path, tokens: int, vocab_size: int) -> Path:
    """Rows of token ids, the longest of them `tokens` long; no tokenizer is needed."""
    rows = []
    for number in range(1, 13):
        ids = [(7 * place * number + place) % vocab_size for place in range(tokens * number // 12)]
        rows.append(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    file.write_text("".join(rows))
    return file


def go(road: Road) -> dict[str, Any]:
    """One job in a process of its own, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = road.words(place)
        began = time.perf_counter()
        line = [sys.executable, __file__, "--witness", str(place / "seen.json"), *words]
        done = _run(line)
        while is_fake_gpu() and _NOT_FINITE in done.stderr:
            # A stand-in copies nothing back: what lay in the host's memory is read as the loss,
            # or as the gradients' norm, and now and then it is no number.
            shutil.rmtree(place / "run", ignore_errors=True)
            done = _run(line)
        row: dict[str, Any] = {
            "case": road.case.name,
            "steps": road.steps,
            "seconds": round(time.perf_counter() - began, 1),
            "exit_code": done.returncode,
        }
        if done.returncode != 0:
            return row | {"faults": [f"exit code {done.returncode}"], "output": done.stderr[-2000:]}
        seen = json.loads((place / "seen.json").read_text())
        return row | judge(RunFolder(place / "run"), json.loads(done.stdout), seen, road.steps)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def judge(
    run: RunFolder, result: dict[str, Any], seen: dict[str, int], steps: int
) -> dict[str, Any]:
    """The ledger's figures beside the witness's, and every fault of the run."""
    ledger = Ledger.from_dict(json.loads(run.memory_json.read_text()))
    allocator = {"allocated": ledger.allocator.allocated, "reserved": ledger.allocator.reserved}
    phases = {
        phase.name: {
            "peak_bytes": phase.peak_bytes,
            "attributed": 1 - phase.at_peak.get("other", 0) / phase.peak_bytes,
        }
        for phase in ledger.phases
    }
    error = ledger.planned_peak_bytes / ledger.measured_peak_bytes - 1
    lines = len(run.metrics.read_text().splitlines())
    checks = {
        f"run.json says {run.read()['status']}": run.read()["status"] == "done",
        f"{lines} lines of metrics, {result['steps']} steps": lines == result["steps"] == steps,
        f"phases {', '.join(phases)}": {"load", "first_step", "eval"} <= set(phases),
        f"the ledger is of a {ledger.device.kind}": ledger.device.kind == "cuda",
        f"the ledger has {allocator}, the allocator {seen}": allocator == seen,
        "the worst phase is not the allocator's peak": peak_phase(ledger.phases).peak_bytes
        == ledger.measured_peak_bytes
        == seen["allocated"],
        f"the plan is off by {error:+.2%}": UNDER <= error <= OVER,
        "something is not attributed": all(p["attributed"] >= ATTRIBUTED for p in phases.values()),
        "no report": run.report.is_file(),
        "no trained weights": run.adapter.is_dir() or run.weights.is_dir(),
    }
    return {
        "faults": [what for what, holds in checks.items() if not holds],
        "planned_bytes": ledger.planned_peak_bytes,
        "error": error,
        "ledger": allocator,
        "witness": seen,
        "phases": phases,
    }


def witness(file: Path, words: Sequence[str]) -> int:
    """The command, with the allocator's peaks of the whole process written to `file`."""
    reset, seen = torch.cuda.reset_peak_memory_stats, {"allocated": 0, "reserved": 0}

    def look() -> None:
        seen["allocated"] = max(seen["allocated"], torch.cuda.max_memory_allocated())
        seen["reserved"] = max(seen["reserved"], torch.cuda.max_memory_reserved())

    def look_and_reset(*arguments: Any) -> None:
        look()
        reset(*arguments)

    torch.cuda.reset_peak_memory_stats = look_and_reset  # type: ignore[assignment]
    if is_fake_gpu():
        # What is copied to the host there is whatever lay in its memory, often no number.
        finite.is_finite = lambda _: True
    code = command.run(list(words))
    look()
    file.write_text(json.dumps(seen))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Goes all roads; 0 where none has a fault."""
    told = sys.argv[1:] if arguments is None else list(arguments)
    if told[:1] == ["--witness"]:
        return witness(Path(told[1]), told[2:])
    options = _parser().parse_args(told)
    if not torch.cuda.is_available():
        print("no CUDA card here", file=sys.stderr)
        return 1
    chosen = [road for road in roads() if re.search(options.only, road.case.name)]
    rows = list(_go_all(chosen, options.jobs))
    report = {
        "command": shlex.join(["python", "tools/validation/cuda_smoke.py", *told]),
        **describe_machine("cuda"),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if any(row["faults"] for row in rows) else 0


def _go_all(chosen: Sequence[Road], jobs: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(jobs) as pool:
        for number, row in enumerate(pool.map(go, chosen), 1):
            faults = "; ".join(row["faults"]) or "no faults"
            told = f"{number}/{len(chosen)} {row['case']}: {faults} after {row['seconds']} s"
            print(told, row.get("output", ""), file=sys.stderr)
            yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name has it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    return parser


if __name__ == "__main__":
    sys.exit(main())
