"""Everything that needs a CUDA card, one part after the other, into one JSON file.

    tools/gpu_check [--out FILE.json] [--minutes 20] [--only PART,PART] [--tiny]

Each part is a process of its own with a time limit, and the file is written anew after each: what
was measured is kept where a later part dies. Exits 1 where a part failed or was left out for want
of time. The project need not be installed; what it imports must be importable.

`--tiny` tries the roads on any machine in a minute or two; its figures mean nothing.
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
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000
"""Characters of a part's output that are kept."""
_REAL = (
    r"^llama (1B data.seq_len=1024 train.micro_batch=4|8B data.seq_len=2048) adapter.targets=all$"
)
"""Of the plan's grid: real shapes that fit a card of 12 GiB."""


def read_json(file: Path) -> Any:
    """Figures that a tool wrote itself."""
    return json.loads(file.read_text())


def read_tests(file: Path) -> dict[str, Any]:
    """Counts, the reasons of what did not pass, and what tests put on record."""
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    cases = list(suite.iter("testcase"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {
        **counts,
        "not_passed": {_name(case): text for case in cases for text in _faults(case)},
        "recorded": {
            _name(case): {p.get("name"): p.get("value") for p in case.iter("property")}
            for case in cases
            if case.find("properties") is not None
        },
    }


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _faults(case: ElementTree.Element) -> Iterator[str]:
    for kind in ("failure", "error"):
        for fault in case.iter(kind):
            yield (fault.get("message") or fault.text or kind)[:TAIL]


@dataclass(frozen=True)
class Part:
    """One command.

    words: behind the interpreter; `{out}` is the file that the part writes. seconds: its limit.
    read: makes figures of that file.
    """

    name: str
    words: tuple[str, ...]
    seconds: int
    read: Callable[[Path], Any] = read_json


def parts(kind: str, tiny: bool) -> list[Part]:
    """All of them, in order. kind: of the device, cpu only where tiny."""
    return [
        Part("environment", ("tools/validation/gpu_facts.py", "--out", "{out}"), 90),
        Part("tests", _tests(), 420, read_tests),
        *_plans(kind, tiny),
        *_cuda_road(kind, tiny),
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
    ]


_INFERENCE = {False: "--rounds 10", True: "--size tiny --rounds 2 --prompt 4 --tokens 2"}
_TRAINING = {
    False: (("starter", "--seq-len 512 --rounds 30"), ("1B", ""), ("8B", "--rounds 4")),
    True: (
        ("starter", "--seq-len 128 --rounds 2 --steps 2"),
        ("tiny", "--seq-len 64 --rounds 2 --steps 1"),
    ),
}


def _tests() -> tuple[str, ...]:
    # Options of the checkout's own settings belong to plug-ins that may not be there.
    own = ("-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning")
    quiet = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1")
    return ("-m", "pytest", "tests/gpu", *quiet, *own, "--junitxml={out}")


def _plans(kind: str, tiny: bool) -> list[Part]:
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


def _cuda_road(kind: str, tiny: bool) -> list[Part]:
    """`qlora train` in all settings; without a card there is no such road."""
    only = "--only '^gpt2 .*targets=all$'" if tiny else ""
    return [_tool("cuda_road", "validation/cuda_smoke", only, 300)] if kind == "cuda" else []


def _tool(name: str, tool: str, words: str, seconds: int) -> Part:
    return Part(name, (f"tools/{tool}.py", *shlex.split(words), "--out", "{out}"), seconds)


def run(part: Part, limit: float) -> dict[str, Any]:
    """What the file holds of this part; whatever goes wrong in it goes wrong there."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "figures"
        words = [word.replace("{out}", str(out)) for word in part.words]
        began = time.monotonic()
        code, tail = _process(words, limit)
        found: dict[str, Any] = {
            "command": shlex.join(["python", *part.words]),
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
            "output": tail,
            "figures": None,
        }
        if out.is_file():
            try:
                found["figures"] = part.read(out)
            except ValueError as fault:  # Half a file, of a part that was stopped.
                found["output"] += f"\n{type(fault).__name__}: {fault}"
        return _without_places(found, place)


def _without_places(found: dict[str, Any], place: str) -> dict[str, Any]:
    """The file is for others, on whose machines these folders are not."""
    text = json.dumps(found)
    for folder, name in ((place, "FOLDER"), (sys.prefix, "PYTHON"), (str(ROOT), ".")):
        text = text.replace(folder, name)
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def _process(words: Sequence[str], limit: float) -> tuple[int | None, str]:
    """(exit code, None where it was stopped; the end of its output). Ends its children, too."""
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
        told, _ = process.communicate(timeout=limit)
        return process.returncode, told[-TAIL:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        told, _ = process.communicate()
        return None, f"{told[-TAIL:]}\nstopped after {limit:.0f} s"


@dataclass
class Report:
    """The file, whole after every part."""

    file: Path | None
    content: dict[str, Any]

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Writes it anew. The first part says which card it is, and so what the file is called."""
        self.content["parts"][name] = found
        failed = [key for key, one in self.content["parts"].items() if one["exit_code"] != 0]
        self.content["failed"] = failed
        device = ((self.content["parts"]["environment"]["figures"]) or {}).get("device", {})
        if self.file is None:
            slug = re.sub(r"[^a-z0-9]+", "_", device.get("name", "unknown").lower()).strip("_")
            self.file = ROOT / "tools" / "measurements" / f"gpu_{slug}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".partial")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.file)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts; 0 where all of them passed."""
    options = _parser().parse_args(words)
    told = sys.argv[1:] if words is None else words
    ends = time.monotonic() + 60 * options.minutes
    report = Report(
        options.out,
        {"command": shlex.join(["tools/gpu_check", *told]), "tiny": options.tiny, "parts": {}},
    )
    first = parts("cuda", options.tiny)[0]
    report.add(first.name, _told(first.name, run(first, first.seconds)))
    kind = ((report.content["parts"][first.name]["figures"]) or {}).get("device", {}).get("kind")
    if kind != "cuda" and not (options.tiny and kind == "cpu"):
        print("no CUDA card here, or its facts could not be read", file=sys.stderr)
        return 1
    for part in parts(kind, options.tiny)[1:]:
        if options.only and part.name not in options.only.split(","):
            continue
        left = ends - time.monotonic()
        found = run(part, min(part.seconds, left)) if left > 0 else _left_out(part)
        report.add(part.name, _told(part.name, found))
    print(f"written to {report.file}; failed: {', '.join(report.content['failed']) or 'none'}")
    return 1 if report.content["failed"] else 0


def _left_out(part: Part) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *part.words]),
        "exit_code": None,
        "seconds": 0.0,
        "output": "left out: no time was left",
        "figures": None,
    }


def _told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    code = "stopped" if found["exit_code"] is None else f"exit code {found['exit_code']}"
    print(f"{name}: {code} after {found['seconds']} s", file=sys.stderr)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="default: tools/measurements/gpu_<card>.json")
    parser.add_argument("--minutes", type=float, default=20, help="for all parts together")
    parser.add_argument("--only", default="", metavar="PART,PART", help="and the environment")
    parser.add_argument("--tiny", action="store_true", help="try the roads, on a CPU too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
