"""Plan and run many configurations and compare the two, byte by byte.

    python tools/validation/plan_vs_run.py [--device cpu|cuda] [--out FILE.json] [--table FILE.md]

On a CPU, memory is measured with torch's profiler, on CUDA with the caching allocator's own peaks.
Neither shares code with the planner. Each configuration runs in a process of its own. Exits with 1
if an error is beyond the bounds. `--trace FILE --only CASE` writes the allocator's events of one
configuration instead, to find the event at which plan and run differ.

A fake GPU (the real allocator without a GPU) can be used in place of a GPU; the output then says
so. It does not show memory that libraries and the driver allocate themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# Before torch is loaded: on a busy machine two threads can be ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from plan_cases import Case
from plan_grids import cpu_grid, cuda_grid, policy_grid
from plan_measure import compare, describe_machine, write_trace
from plan_table import failures, largest_error_first, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; return 0 if every error is within the bounds."""
    options = _parser().parse_args(arguments)
    cases = [case for case in _grid(options) if re.search(options.only, case.name)]
    if options.trace:
        return _trace(cases, options.trace)
    began = time.perf_counter()
    rows = largest_error_first(_run(cases, options))
    report = {
        "command": " ".join(
            ["python", "tools/validation/plan_vs_run.py", *(arguments or sys.argv[1:])]
        ),
        **_describe(options.device),
        "seconds": round(time.perf_counter() - began),
        "rows": rows,
    }
    text = table(report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.table:
        options.table.write_text(text)
    print(text)
    failed = failures(rows)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed or len(rows) < len(cases) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--table", type=Path, metavar="FILE.md")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--policies", action="store_true", help="the grid of activation policies")
    parser.add_argument("--small", action="store_true", help="every sixth case of the CPU grid")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.jsonl", help="write the allocator's events"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    return parser


def _grid(options: argparse.Namespace) -> Sequence[Case]:
    if options.policies:
        return policy_grid(options.device)
    if options.device == "cuda":
        return [c for c in cuda_grid() if not options.small or c.shape == "small"]
    return cpu_grid()[:: 6 if options.small else 1]


def _run(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with _pool(options.device, options.jobs) as pool:
        waiting = {pool.submit(compare, case, options.device): case for case in cases}
        for done, future in enumerate(as_completed(waiting), 1):
            yield from _result(future, waiting[future], f"{done}/{len(cases)}")


def _result(future: Future[dict[str, Any]], case: Case, count: str) -> Iterator[dict[str, Any]]:
    try:
        row = future.result()
    except Exception as error:  # The other cases still run; main returns 1.
        print(f"{count} {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return
    print(f"{count} {row['error']:+.2%} {case.name}", file=sys.stderr)
    yield row


def _pool(device: str, jobs: int) -> ProcessPoolExecutor:
    """Return a pool in which each task has a new process."""
    if device == "cuda":
        # Importing bitsandbytes initializes CUDA, which does not work after a fork.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1)
    # The fork server finds modules by this variable alone.
    here, existing = str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, existing)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["plan_measure"])
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)


def _describe(device: str) -> dict[str, Any]:
    with _pool(device, 1) as pool:
        return pool.submit(describe_machine, device).result()


def _trace(cases: Sequence[Case], file: Path) -> int:
    if len(cases) != 1:
        print("--trace takes one case; name it with --only:", file=sys.stderr)
        print(*(case.name for case in cases), sep="\n", file=sys.stderr)
        return 2
    print(f"{write_trace(cases[0], file)} events of {cases[0].name} in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
