"""Whole tools beside each other: ours, Trainer with PEFT and bitsandbytes, TRL, Unsloth.

    python tools/benchmarks/compare_tools.py --model FOLDER --rows ALPACA.jsonl --out FILE.json
    python tools/benchmarks/compare_tools.py --shape 8B --dtype bfloat16 --out FILE.json

Every run is a process of its own (`tool_process.py`); the tools take turns, and each round begins
with another one. Ratios are taken within a round, so that a busy machine slows all of them. Three
scenarios:

- equal: equal settings, rows of equal length without padding, one row a step;
- memory: the same, but ours recomputes as few blocks as the memory that Trainer takes allows;
- defaults: each tool's own settings on real rows, of which the answers are trained. Time that is
  spent on padding counts against the tool that pads.

NF4, 8 or 16 bit, LoRA of rank 16 on all linears. `--shape` writes a model with random weights. A
tool that is not installed is left out, with a line on stderr. A file that exists is continued: its
cells are not measured again, and each cell records its command. `--table` writes the table of
docs/performance.md from a file that exists. Peft and trl are pinned in tools/constraints.txt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench_inference import spread, where
from random_model import SHAPES, make_random_model, make_random_rows
from tool_process import PACKAGES, TOOLS
from tool_runs import Bench, Cell

from qlora_cli.files.atomic import write_json

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tools -->", "<!-- end of tools -->"
OURS, REFERENCE = "ours", "trainer"
_SCENARIOS = ("equal", "memory", "defaults")
_LIMIT_RUNS = 3
_PARTS = 4
"""Ours is tried with so many fewer quarters of its blocks recomputed."""


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the comparisons that the options name."""
    for scenario in options.scenarios:
        for bits in options.bits:
            if scenario == "defaults":
                yield Cell(scenario, bits, 0, True)
                continue
            for tokens in options.tokens:
                for checkpointing in (True,) if scenario == "memory" else options.checkpointing:
                    yield Cell(scenario, bits, tokens, checkpointing)


def compare(bench: Bench, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all tools in one cell."""
    own = own_cell(bench, cell, options) if cell.scenario == "memory" else cell
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in options.tools}
    for turn in range(options.rounds):
        first = turn % len(options.tools)
        for tool in (*options.tools[first:], *options.tools[:first]):
            runs[tool].append(bench.run(tool, own if tool == OURS else cell))
            print(f"{cell.name}: round {turn + 1}, {tool}", file=sys.stderr)
    tokens = bench.trained_tokens(cell)
    return {
        "cell": cell.name,
        "ours_recomputes": own.checkpointing,
        "trained_tokens": tokens,
        "tools": {tool: _figures(found, cell, tokens) for tool, found in runs.items()},
        "ratios": {
            tool: _ratios(runs[OURS], found, cell) for tool, found in runs.items() if tool != OURS
        },
    }


def own_cell(bench: Bench, cell: Cell, options: argparse.Namespace) -> Cell:
    """Return the cell in which ours recomputes the fewest blocks within the other's memory.

    The other's memory is the median of some runs, because resident memory differs between runs.
    """
    limit = median(bench.run(REFERENCE, cell)["step_memory_bytes"] for _ in range(_LIMIT_RUNS))
    config = json.loads((options.model / "config.json").read_text())
    blocks = int(config["num_hidden_layers"])
    for part in range(_PARTS + 1):
        tried = replace(cell, checkpointing=blocks * part // _PARTS)
        if bench.run(OURS, tried)["step_memory_bytes"] <= limit:
            return tried
    return cell


def _figures(runs: Sequence[Mapping[str, Any]], cell: Cell, tokens: int) -> dict[str, Any]:
    clock = "clock" if cell.scenario == "defaults" else "clock_per_step"
    return {
        "seconds": spread([run[clock] for run in runs]),
        "processor_seconds": spread([run[clock.replace("clock", "processor")] for run in runs]),
        "trained_tokens_per_second": spread([tokens / run["clock"] for run in runs]),
        "step_memory_bytes": max(run["step_memory_bytes"] for run in runs),
        "mean_loss": fmean(fmean(run["losses"]) for run in runs),
        "last_loss": fmean(run["losses"][-1] for run in runs),
        "steps": runs[0]["steps"],
    }


def _ratios(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], cell: Cell
) -> dict[str, Any]:
    """Return how many times as fast ours is, and its share of the other's step memory."""
    end = "" if cell.scenario == "defaults" else "_per_step"
    rounds = list(zip(ours, others, strict=True))
    return {
        "speed_by_clock": spread(
            [other[f"clock{end}"] / own[f"clock{end}"] for own, other in rounds]
        ),
        "speed_by_processor": spread(
            [other[f"processor{end}"] / own[f"processor{end}"] for own, other in rounds]
        ),
        "memory": spread(
            [own["step_memory_bytes"] / other["step_memory_bytes"] for own, other in rounds]
        ),
    }


def table(report: Mapping[str, Any]) -> str:
    """Return the table of docs/performance.md."""
    lines = [
        "| cell | beside | speed, processor time | speed, clock | step memory | our loss | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        for tool, ratios in row["ratios"].items():
            cellsof = [
                _spread(ratios[name]) for name in ("speed_by_processor", "speed_by_clock", "memory")
            ]
            losses = [f"{row['tools'][name]['mean_loss']:.3f}" for name in (OURS, tool)]
            lines.append("| " + " | ".join([row["cell"], tool, *cellsof, *losses]) + " |")
    return "\n".join(lines)


def _spread(figures: Mapping[str, float]) -> str:
    low, high = figures["lower_quartile"], figures["upper_quartile"]
    return f"{figures['median']:.2f}x ({low:.2f} to {high:.2f})"


def write_table(page: Path, report: Mapping[str, Any]) -> None:
    """Write the table between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only write the table of --out")
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights, in place of --model")
    parser.add_argument("--rows", type=Path, help="JSON lines: instruction, input, output")
    parser.add_argument("--scenarios", nargs="+", choices=_SCENARIOS, default=_SCENARIOS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=tuple(TOOLS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8, 16), default=(4, 8, 16))
    parser.add_argument("--tokens", nargs="+", type=int, default=(256, 1024))
    parser.add_argument(
        "--checkpointing", nargs="+", type=json.loads, default=(True, False), metavar="true|false"
    )
    parser.add_argument("--dtype", default="float32", help="compute dtype of equal settings")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--skip", type=int, default=4, help="steps before them; ours measures in 3")
    parser.add_argument("--num-rows", type=int, default=200, help="rows of an epoch of `defaults`")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is torch's choice")
    return parser


def _is_installed(tool: str) -> bool:
    missing = [package for package in PACKAGES[tool] if find_spec(package) is None]
    if missing:
        print(f"{tool} is left out: {', '.join(missing)} is not installed", file=sys.stderr)
    return not missing


def main(words: Sequence[str] | None = None) -> None:
    """Run every cell and write one JSON file, after each cell."""
    options = _parser().parse_args(words)
    if options.table:
        write_table(PAGE, json.loads(options.out.read_text()))
        return
    if OURS not in options.tools or (options.shape is None) != bool(options.model and options.rows):
        raise SystemExit("give --model and --rows, or --shape, and ours among --tools")
    options.tools = [tool for tool in options.tools if _is_installed(tool)]
    given = sys.argv[1:] if words is None else words
    command = shlex.join(["python", "tools/benchmarks/compare_tools.py", *given])
    report = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    measured = {row["cell"] for row in report["rows"]}
    with tempfile.TemporaryDirectory() as place:
        if options.shape:
            options.model = make_random_model(Path(place, "model"), options.shape)
            options.rows = make_random_rows(Path(place, "random.jsonl"), options.num_rows)
        bench = Bench(options, Path(place))
        for cell in cells(options):
            if cell.name not in measured:
                row = compare(bench, cell, options)
                threads = {"threads": options.threads} if options.threads else {}
                report["rows"].append({"command": command, **row, "where": where() | threads})
                write_json(options.out, report)
    print(table(report))


if __name__ == "__main__":
    main()
