"""Run `qlora train` on CUDA to its end, in all settings, and check its ledger.

    python tools/validation/cuda_smoke.py [--out FILE.json] [--only REGEX] [--jobs 2]

Small models of every family run with all bits, optimizers and methods for three steps. An 8B model
runs for two steps, because the optimizer's states exist only from the second step on. Its
checkpoint is a sparse file of zeros that takes no disk space. Each job is the command itself in a
process of its own. A peak recorder in that process reads the caching allocator's peaks each time
before they are reset. It is independent of the job's instrument.

Each job is checked for five things: it ends without an error, the run's folder is complete, the
ledger's figures equal the allocator's byte for byte, the plan is within its bounds, and at least
99 % of each peak is attributed to a category.

No GPU is needed if the checks run on a fake GPU: the real allocator and the real CPU code of torch
and bitsandbytes, with empty kernels. A fake GPU gives no speed and no values: the loss is read as
zero, kernels that only a real GPU selects do not run, and 8 bit runs without outlier columns,
because finding them needs a kernel.
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
from plan_cases import FILE_DTYPE, Case, SyntheticSource
from plan_measure import describe_machine
from plan_table import OVER, UNDER

from qlora_cli.cli import main as command
from qlora_cli.files import finite
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.files.source import WEIGHTS_FILE
from qlora_cli.memory.ledger import Ledger, peak_phase
from qlora_cli.models.build import skeleton
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps

_NOT_FINITE = "not finite"
ATTRIBUTED = 0.99
"""Share of each phase's peak that must be in categories other than `other`."""
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
"""(family, overrides) of the jobs with a small model."""


@dataclass(frozen=True)
class SmokeCase:
    """One job. is_sparse: whether its checkpoint is a sparse file of zeros."""

    case: Case
    steps: int = 3
    is_sparse: bool = False

    def write(self, folder: Path) -> list[str]:
        """Write base, rows and recipe to `folder` and return the arguments of `qlora`."""
        tokens = self.case.recipe().data.seq_len
        base = self._write_base(folder / "base")
        rows = write_rows(folder / "rows.jsonl", tokens, self.case.config().vocab_size)
        recipe = {
            "model": {"name": str(base)},
            "data": {"train": str(rows), "eval": str(rows), "seq_len": tokens},
            "train": {"steps": self.steps, "grad_accum": 2},
            "output": str(folder / "run"),
        }
        # JSON is YAML.
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        return ["train", str(folder / "recipe.yaml"), *self.case.changes, "--json"]

    def _write_base(self, folder: Path) -> Path:
        self.case.config().save_pretrained(folder)
        source = SyntheticSource(
            *skeleton(self.case.config(), FILE_DTYPE), with_values=not self.is_sparse
        )
        file = folder / WEIGHTS_FILE
        if self.is_sparse:
            write_sparse(file, source)
        else:
            shapes = {name: TensorSpec(FILE_DTYPE, source.shape(name)) for name in source.names()}
            write_tensors(file, shapes, source.read, {"format": "pt"})
        return folder


def smoke_cases() -> list[SmokeCase]:
    """Return the jobs: small models in all settings, then an 8B model."""
    small = (
        SmokeCase(Case(family, "small", ("data.seq_len=256", *text.split()), 32000))
        for family, text in _SETTINGS
    )
    return [
        *small,
        SmokeCase(Case("llama", "8B", ("data.seq_len=2048", _ALL)), steps=2, is_sparse=True),
    ]


def write_sparse(file: Path, source: SyntheticSource) -> None:
    """Write a safetensors file of zeros that takes no disk space: a header and a sparse rest."""
    header: dict[str, Any] = {}
    end = 0
    for name in source.names():
        start, shape = end, source.shape(name)
        end += FILE_DTYPE.itemsize * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_rows(file: Path, tokens: int, vocab_size: int) -> Path:
    """Write rows of token ids, the longest with `tokens` tokens; no tokenizer is needed."""
    rows = []
    for number in range(1, 13):
        ids = [(7 * place * number + place) % vocab_size for place in range(tokens * number // 12)]
        rows.append(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    file.write_text("".join(rows))
    return file


def run_job(job: SmokeCase) -> dict[str, Any]:
    """Run one job in a process of its own and return its row of the report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = job.write(folder)
        began = time.perf_counter()
        command_line = [
            *(sys.executable, __file__, "--record-peaks", str(folder / "peaks.json")),
            *words,
        ]
        done = _run(command_line)
        while is_fake_gpu() and _NOT_FINITE in done.stderr:
            # A fake GPU copies nothing back. The previous content of CPU memory is read as the loss
            # or as the gradient norm, and sometimes it is not a finite number.
            shutil.rmtree(folder / "run", ignore_errors=True)
            done = _run(command_line)
        row: dict[str, Any] = {
            "case": job.case.name,
            "steps": job.steps,
            "seconds": round(time.perf_counter() - began, 1),
            "exit_code": done.returncode,
        }
        if done.returncode != 0:
            return row | {"faults": [f"exit code {done.returncode}"], "output": done.stderr[-2000:]}
        peaks = json.loads((folder / "peaks.json").read_text())
        return row | check_run(RunFolder(folder / "run"), json.loads(done.stdout), peaks, job.steps)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def check_run(
    run: RunFolder, result: dict[str, Any], peaks: dict[str, int], steps: int
) -> dict[str, Any]:
    """Compare the ledger of a finished run with the recorded peaks and list all faults.

    result: what `qlora train --json` printed. peaks: the allocator's peaks of the process. steps:
    the number of steps that the recipe sets.
    """
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
    status, lines = run.read()["status"], len(read_steps(run.metrics))
    checks = {
        f"the status in run.json is {status}": status == "done",
        f"{lines} lines of metrics, {result['steps']} steps": lines == result["steps"] == steps,
        f"the phases are {', '.join(phases)}": {"load", "first_step", "eval"} <= set(phases),
        f"the ledger's device is {ledger.device.kind}": ledger.device.kind == "cuda",
        f"the ledger has {allocator}, the allocator {peaks}": allocator == peaks,
        "the highest phase is not the allocator's peak": peak_phase(ledger.phases).peak_bytes
        == ledger.measured_peak_bytes
        == peaks["allocated"],
        f"the error of the plan is {error:+.2%}": UNDER <= error <= OVER,
        "too few bytes are attributed": all(p["attributed"] >= ATTRIBUTED for p in phases.values()),
        "no report": run.report.is_file(),
        "no trained weights": run.adapter.is_dir() or run.weights.is_dir(),
    }
    faults = [fault for fault, passed in checks.items() if not passed]
    figures = {"planned_bytes": ledger.planned_peak_bytes, "error": error, "ledger": allocator}
    return {"faults": faults, **figures, "recorded": peaks, "phases": phases}


def record_peaks(file: Path, words: Sequence[str]) -> int:
    """Run the command `qlora` and write the allocator's peaks of the complete process to `file`."""
    reset, peaks = torch.cuda.reset_peak_memory_stats, {"allocated": 0, "reserved": 0}

    def read() -> None:
        peaks["allocated"] = max(peaks["allocated"], torch.cuda.max_memory_allocated())
        peaks["reserved"] = max(peaks["reserved"], torch.cuda.max_memory_reserved())

    def read_and_reset(*arguments: Any) -> None:
        read()
        reset(*arguments)

    torch.cuda.reset_peak_memory_stats = read_and_reset  # type: ignore[assignment]
    if is_fake_gpu():
        # A copy from a fake GPU has arbitrary content, often no finite number.
        finite.is_finite = lambda _: True
    code = command.run(list(words))
    read()
    file.write_text(json.dumps(peaks))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all jobs; return 0 if none has a fault."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--record-peaks"]:
        return record_peaks(Path(words[1]), words[2:])
    options = _parser().parse_args(words)
    if not torch.cuda.is_available():
        print("no CUDA GPU found", file=sys.stderr)
        return 1
    chosen = [job for job in smoke_cases() if re.search(options.only, job.case.name)]
    rows = list(_run_all(chosen, options.jobs))
    report = {
        "command": shlex.join(["python", "tools/validation/cuda_smoke.py", *words]),
        **describe_machine("cuda"),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if any(row["faults"] for row in rows) else 0


def _run_all(chosen: Sequence[SmokeCase], jobs: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(jobs) as pool:
        for number, row in enumerate(pool.map(run_job, chosen), 1):
            faults = "; ".join(row["faults"]) or "no faults"
            line = f"{number}/{len(chosen)} {row['case']}: {faults} after {row['seconds']} s"
            print(line, row.get("output", ""), file=sys.stderr)
            yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
