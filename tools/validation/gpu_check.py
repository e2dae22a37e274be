"""Run all checks that need a CUDA GPU, one after another, and write the results to one JSON file.

    tools/gpu_check [--out FILE.json] [--minutes 20] [--only CHECK,CHECK] [--tiny]

Each check is a process of its own with a time limit. The file is written again after each check, so
earlier results are kept if a later check fails. Exits with 1 if a check failed or was skipped
because no time was left. The project need not be installed, but its dependencies must be
importable.

`--tiny` tries the checks on any machine in one or two minutes. Its figures have no meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from junit import read_tests

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000
"""Number of characters at the end of a check's output that are kept."""
_REAL = (
    r"^llama (1B data.seq_len=1024 train.micro_batch=4|8B data.seq_len=2048) adapter.targets=all$"
)
"""Cases of the plan's grid with real shapes that fit a GPU of 12 GiB."""


def read_json(file: Path) -> Any:
    """Return the JSON figures that a tool wrote."""
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Check:
    """One command.

    words: the arguments of the interpreter; `{out}` is replaced by the file that the command
    writes. seconds: time limit. read: converts that file to figures.
    """

    name: str
    words: tuple[str, ...]
    seconds: int
    read: Callable[[Path], Any] = read_json


def checks(kind: str, tiny: bool) -> list[Check]:
    """Return all checks, in order. kind: "cuda", or "cpu" if `tiny`."""
    return [
        Check("environment", ("tools/validation/gpu_facts.py", "--out", "{out}"), 90),
        Check("tests", _tests(), 420, read_tests),
        *_plans(kind, tiny),
        *_cuda_smoke(kind, tiny),
        _tool("inference", "benchmarks/bench_inference", _INFERENCE[tiny], 150),
        *(
            _tool(
                f"training_{shape}",
                "benchmarks/bench_train",
                f"--device {kind} --shape {shape} {more}",
                240,
            )
            for shape, more in _TRAINING[tiny]
        ),
        *(
            _tool(f"tools_{shape}", "benchmarks/compare_tools", f"--shape {shape} {more}", seconds)
            for shape, more, seconds in _TOOLS[tiny]
        ),
    ]


_INFERENCE = {False: "--rounds 10", True: "--size tiny --rounds 2 --prompt 4 --tokens 2"}
_TRAINING = {
    False: (("starter", "--seq-len 512 --rounds 30"), ("1B", ""), ("8B", "--rounds 4")),
    True: (
        ("starter", "--seq-len 128 --rounds 2 --steps 2"),
        ("tiny", "--seq-len 64 --rounds 2 --steps 1"),
    ),
}


_EQUAL = "--scenarios equal --bits 4"
_TOOLS = {
    False: (
        ("1B", f"{_EQUAL} --dtype bfloat16 --tokens 1024 --steps 16", 240),
        ("8B", f"{_EQUAL} --dtype bfloat16 --tokens 1024 --checkpointing true --rounds 3", 420),
    ),
    True: (("tiny", f"{_EQUAL} --tools ours --tokens 32 --checkpointing true --rounds 2", 150),),
}
"""Whole tools: shape, options, seconds. Those that are not installed are left out."""


def _tests() -> tuple[str, ...]:
    # The options in pyproject.toml belong to pytest plug-ins that may not be installed.
    own = ("-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning")
    quiet = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1")
    return ("-m", "pytest", "tests/gpu", *quiet, *own, "--junitxml={out}")


def _plans(kind: str, tiny: bool) -> list[Check]:
    if tiny:
        only = "^gpt2 small vocab=32000 data.seq_len=512$" if kind == "cuda" else "qwen3"
        small = "" if kind == "cuda" else " --small"
        return [
            _tool("plan", "validation/plan_vs_run", f"--device {kind}{small} --only '{only}'", 240)
        ]
    return [
        _tool("plan", "validation/plan_vs_run", "--device cuda --small", 360),
        _tool(
            "plan_of_real_shapes",
            "validation/plan_vs_run",
            f"--device cuda --jobs 1 --only '{_REAL}'",
            180,
        ),
    ]


def _cuda_smoke(kind: str, tiny: bool) -> list[Check]:
    """Return the check of `qlora train` in all settings; there is none without a GPU."""
    only = "--only '^gpt2 .*targets=all$'" if tiny else ""
    return [_tool("cuda_smoke", "validation/cuda_smoke", only, 300)] if kind == "cuda" else []


def _tool(name: str, tool: str, words: str, seconds: int) -> Check:
    return Check(name, (f"tools/{tool}.py", *shlex.split(words), "--out", "{out}"), seconds)


def run(check: Check, limit: float) -> dict[str, Any]:
    """Run a check and return its entry of the report. limit: time limit in seconds.

    An error inside the check is part of the entry and does not raise.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures"
        words = [word.replace("{out}", str(out)) for word in check.words]
        began = time.monotonic()
        code, tail = _process(words, limit)
        entry: dict[str, Any] = {
            "command": shlex.join(["python", *check.words]),
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
            "output": tail,
            "figures": None,
        }
        if out.is_file():
            try:
                entry["figures"] = check.read(out)
            except ValueError as error:  # An incomplete file of a check that was stopped.
                entry["output"] += f"\n{type(error).__name__}: {error}"
        return _without_local_paths(entry, folder)


def _without_local_paths(entry: dict[str, Any], temporary: str) -> dict[str, Any]:
    """Return the entry without this machine's folders, because the report is for others."""
    text = json.dumps(entry)
    for path, name in ((temporary, "FOLDER"), (sys.prefix, "PYTHON"), (str(ROOT), ".")):
        text = text.replace(path, name)
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def _process(words: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Run Python with these arguments and return (exit code, end of the output).

    The exit code is None if the time limit was reached; then all child processes are ended, too.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output[-TAIL:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return None, f"{output[-TAIL:]}\nstopped after {limit:.0f} s"


@dataclass
class Report:
    """The report file, complete after every check."""

    file: Path | None
    content: dict[str, Any]

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Add an entry and write the file. The first check's GPU name gives the file its name."""
        self.content["parts"][name] = entry
        failed = [key for key, item in self.content["parts"].items() if item["exit_code"] != 0]
        self.content["failed"] = failed
        device = ((self.content["parts"]["environment"]["figures"]) or {}).get("device", {})
        if self.file is None:
            slug = re.sub(r"[^a-z0-9]+", "_", device.get("name", "unknown").lower()).strip("_")
            self.file = ROOT / "tools" / "measurements" / f"gpu_{slug}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.file)


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks; return 0 if all of them passed."""
    options = _parser().parse_args(words)
    arguments = sys.argv[1:] if words is None else words
    ends = time.monotonic() + 60 * options.minutes
    report = Report(
        options.out,
        {"command": shlex.join(["tools/gpu_check", *arguments]), "tiny": options.tiny, "parts": {}},
    )
    first = checks("cuda", options.tiny)[0]
    report.add(first.name, _print_result(first.name, run(first, first.seconds)))
    kind = ((report.content["parts"][first.name]["figures"]) or {}).get("device", {}).get("kind")
    if kind != "cuda" and not (options.tiny and kind == "cpu"):
        print("no CUDA GPU found, or its properties could not be read", file=sys.stderr)
        return 1
    for check in checks(kind, options.tiny)[1:]:
        if options.only and check.name not in options.only.split(","):
            continue
        left = ends - time.monotonic()
        entry = run(check, min(check.seconds, left)) if left > 0 else _skipped(check)
        report.add(check.name, _print_result(check.name, entry))
    print(f"written to {report.file}; failed: {', '.join(report.content['failed']) or 'none'}")
    return 1 if report.content["failed"] else 0


def _skipped(check: Check) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *check.words]),
        "exit_code": None,
        "seconds": 0.0,
        "output": "skipped: no time was left",
        "figures": None,
    }


def _print_result(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    code = "stopped" if entry["exit_code"] is None else f"exit code {entry['exit_code']}"
    print(f"{name}: {code} after {entry['seconds']} s", file=sys.stderr)
    return entry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="default: tools/measurements/gpu_<GPU name>.json")
    parser.add_argument(
        "--minutes", type=float, default=20, help="time limit of all checks together"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="CHECK,CHECK",
        help="checks to run in addition to the environment",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="try the checks with tiny models, also on a CPU"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
