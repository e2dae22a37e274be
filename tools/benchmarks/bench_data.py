"""Time and memory of reading a large data file: `qlora data`, and `qlora train` to its first step.

    python tools/benchmarks/bench_data.py MODEL CHATS --rows 20000 200000 --command data train \
        --package . OLD_CHECKOUT --out tools/measurements/data_cpu.json

MODEL is a base's folder. CHATS is a JSONL file of rows with `question` and `answer`; a file of the
wanted number of different chats is generated from them. Every command runs in a process of its own
for each package, which is the folder of a checkout. Memory and processor time are sampled twice
per second: the peak of the anonymous memory of the command's process, of its children, and of all
together. Pages of mapped files are not counted, because the system can drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_cli.files.atomic import write_json
from qlora_cli.jobs.record import versions

_CACHE = "QLORA_CACHE"
_FIRST_STEP = b"step 1 of"


def write_chats(source: Path, target: Path, rows: int) -> None:
    """Write `rows` different chats, line by line."""
    pairs = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as file:
        for number in range(rows):
            pair = pairs[number % len(pairs)]
            chat = [
                {"role": "user", "content": f"Problem {number}. {pair['question']}"},
                {"role": "assistant", "content": pair["answer"]},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")


def anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that belongs to no file; 0 if it has ended.

    Memory that processes share is divided among them (PSS), so that sizes can be added.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(
        int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    )


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> Iterator[int]:
    """Yield the children of a process and their children."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def measure(
    command: list[str], environment: dict[str, str], folder: Path, until: bytes | None
) -> dict[str, Any]:
    """Run a command and return its seconds, processor time and peaks of memory.

    folder: the current folder of the command. until: stop the command once its stderr contains
    this; None waits for its end.
    """
    peaks = {"process": 0, "children": 0, "together": 0}
    cpu: dict[int, float] = {}
    with tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None:
            time.sleep(0.5)
            children = list(descendants(process.pid))
            for pid in (process.pid, *children):
                cpu[pid] = max(cpu.get(pid, 0.0), cpu_seconds(pid))
            own = anonymous_bytes(process.pid)
            others = [anonymous_bytes(pid) for pid in children]
            sizes = {"process": own, "children": sum(others), "together": own + sum(others)}
            peaks = {key: max(size, peaks[key]) for key, size in sizes.items()}
            if until is not None and until in _content(errors):
                seconds = time.monotonic() - start
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
        else:
            seconds = time.monotonic() - start
            if process.returncode:
                raise SystemExit(_content(errors).decode())
    total = round(sum(cpu.values()), 1)
    return {"seconds": round(seconds, 1), "cpu_seconds": total, "peak_bytes": peaks}


def _content(file: Any) -> bytes:
    descriptor = file.fileno()
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def recipe(model: Path, rows: Path, folder: Path) -> Path:
    """Write a recipe that trains the smallest adapter for some steps."""
    content = {
        "model": {"name": str(model)},
        "data": {"train": str(rows)},
        "adapter": {"rank": 1},
        "train": {"steps": 50, "grad_accum": 1},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def compare(options: argparse.Namespace, number: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the measurements of one number of rows."""
    rows = folder / f"rows-{number}.jsonl"
    write_chats(options.chats, rows, number)
    for package in options.package:
        environment = os.environ | {
            "PYTHONPATH": str(package.resolve()),
            "HF_HUB_OFFLINE": "1",
            _CACHE: str(folder / "cache" / package.resolve().name),
        }
        for command in options.command:
            for run in range(options.repeat):
                job = recipe(options.model, rows, Path(tempfile.mkdtemp(dir=folder)))
                call = [sys.executable, "-c", "from qlora_cli.cli.main import main; main()"]
                until = _FIRST_STEP if command == "train" else None
                result = measure([*call, command, str(job)], environment, package, until)
                facts = {"rows": number, "bytes": rows.stat().st_size, "package": str(package)}
                print(facts | {"command": command, "run": run + 1} | result, flush=True)
                yield facts | {"command": command, "run": run + 1} | result
    rows.unlink()


def main() -> None:
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000])
    parser.add_argument("--command", nargs="+", default=["data"], choices=["data", "train"])
    parser.add_argument("--package", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--repeat", type=int, default=2, help="runs; later ones find the cache")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            result for number in options.rows for result in compare(options, number, Path(folder))
        ]
    command = shlex.join(["python", *sys.argv])
    content = {"command": command, "cores": os.cpu_count(), "versions": versions()}
    write_json(options.out, content | {"results": results})


if __name__ == "__main__":
    main()
