"""Writes the tables of docs/paper.md from the figures in tools/measurements/paper.

    python tools/paper/tables.py

A cell that an experiment has and the figures lack is shown as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from experiments import EXPERIMENTS
from inference_cells import STATES
from memory_cells import LARGE_CELLS
from paper_cells import MEASUREMENTS, ROOT, Experiment, find_cell

from qlora_cli.units import format_bytes, format_count

PAGE = ROOT / "docs" / "paper.md"
NOT_MEASURED = "not measured"
REFERENCE = {
    "full": 89.1,
    "lora": 86.8,
    "int8": 87.0,
    "nf4": 87.2,
    "nf4, all linears": 87.4,
    "head": 65.0,
}
"""Test accuracy on `sst2` of plain PEFT 0.21.2 and bitsandbytes 0.50.2: one seed, 3 epochs."""

Entry = Mapping[str, Any]


def read(experiment: Experiment, folder: Path = MEASUREMENTS) -> list[Entry]:
    """Return the measured cells that the experiment has now; none if there is no file."""
    file = folder / experiment.file_name
    entries = json.loads(file.read_text())["cells"] if file.exists() else []
    found = (find_cell(entries, cell) for cell in experiment.cells)
    return [entry for entry in found if entry is not None]


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def groups(experiment: Experiment, entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return name of a cell -> what was measured of it, one entry for each seed."""
    names = dict.fromkeys(cell.name for cell in experiment.cells)
    return {name: [entry for entry in entries if entry["name"] == name] for name in names}


def number(entries: Sequence[Entry], key: str, style: Callable[[float], str]) -> str:
    """Return the mean of a figure of the entries, and its standard deviation if there are more."""
    values = [entry["result"][key] for entry in entries if key in entry["result"]]
    if not values:
        return NOT_MEASURED
    spread = f" ± {style(stdev(values))}" if len(values) > 1 else ""
    return f"{style(fmean(values))}{spread}"


def percent(share: float) -> str:
    """Return a share in percent with one decimal."""
    return f"{100 * share:.1f}"


def minutes(entries: Sequence[Entry]) -> str:
    """Return the mean minutes of the entries that were measured without a stop."""
    taken = [entry["seconds"] / 60 for entry in entries if not entry["resumed"]]
    return f"{fmean(taken):.1f}" if taken else "-"


def size(num: float) -> str:
    """Return a number of bytes for people."""
    return format_bytes(round(num))


def accuracy_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of `sst2` or `rte`."""
    has_test = experiment.name == "sst2"
    header = ["method", "seeds", "dev, %"]
    header += ["test, %", "PEFT, test, %"] if has_test else []
    rows = []
    for name, found in groups(experiment, entries).items():
        row = [name, str(len(found)), number(found, "dev_accuracy", percent)]
        if has_test:
            row += [number(found, "test_accuracy", percent), f"{REFERENCE[name]:.1f}"]
        figures = [number(found, key, size) for key in ("checkpoint_bytes", "peak_bytes")]
        rows.append([*row, *figures, minutes(found)])
    return grid([*header, "checkpoint", "peak memory", "min"], rows)


def memory_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of the measured shape, and that of the planned one."""
    found = groups(experiment, entries)
    large = [f"{_large_table(name, found.pop(name))}\n" for name in LARGE_CELLS]
    rows = []
    for name, group in found.items():
        base = found["full, recomputed" if name.endswith("recomputed") else "full"]
        row = [name, number(group, "trainable_parameters", lambda n: format_count(round(n)))]
        keys = ("checkpoint_bytes", "planned_peak_bytes", "measured_peak_bytes")
        row += [number(group, key, size) for key in keys]
        peaks = [g[0]["result"]["measured_peak_bytes"] for g in (base, group) if g]
        ratio = f"{peaks[0] / peaks[1]:.1f}x" if len(peaks) == 2 else NOT_MEASURED
        rows.append([*row, ratio, minutes(group)])
    header = ["method", "trained", "checkpoint", "peak, planned", "peak, measured", "full / this"]
    sums = [entry for entry in entries if entry["name"] in LARGE_CELLS][:1]
    return "\n".join([grid([*header, "min"], rows), "", *large, _arithmetic(sums)])


def _large_table(name: str, entries: Sequence[Entry]) -> str:
    header = [name, "peak, planned", "full / this"]
    if not entries:
        return grid(header, [["all methods", NOT_MEASURED, NOT_MEASURED]])
    names = {16: "LoRA", 8: "LoRA, int8", 4: "LoRA, NF4"}
    rows = [
        [
            "full" if row["method"] == "full" else names[row["bits"]],
            size(row["peak_bytes"]),
            f"{row['ratio']:.1f}x",
        ]
        for row in entries[0]["result"]["compare"]
    ]
    return grid(header, rows)


def _arithmetic(entries: Sequence[Entry]) -> str:
    items = entries[0]["result"]["arithmetic"] if entries else []
    sums = [[item["name"], size(item["value"])] for item in items if item["unit"] == "B"]
    return grid(["GPT-3 175B, arithmetic", "bytes"], sums or [["all sums", NOT_MEASURED]])


def latency_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of `latency`: ratios to the base."""
    found = groups(experiment, entries)
    kinds = [(name, what) for name in found for what in ("prompt", "token")]
    rows = []
    for state in STATES[1:]:
        cells = [
            _ratio(found[name][0]["result"][what][f"{state} / base"])
            if found[name]
            else NOT_MEASURED
            for name, what in kinds
        ]
        rows.append([state, *cells])
    return grid(["beside the base", *(f"{name}, {what}" for name, what in kinds)], rows)


def _ratio(figures: Mapping[str, float]) -> str:
    low, high = figures["lower_quartile"], figures["upper_quartile"]
    return f"{figures['median']:.2f}x ({low:.2f} to {high:.2f})"


def tasks_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of `tasks`: one row for each figure."""
    if not entries:
        return grid(["many tasks", ""], [["all figures", NOT_MEASURED]])
    result = entries[0]["result"]
    switch = {kind: f"{1000 * t['median']:.1f} ms" for kind, t in result["switch_seconds"].items()}
    share = f"{size(result['memory_bytes'])}, {percent(result['share_of_base'])} % of the base's"
    rows = [
        ["tasks on one base", str(result["tasks"])],
        ["file of a task", size(result["file_bytes"])],
        ["memory of a task", share],
        ["switch, beside the weights", switch["unmerged"]],
        ["switch, merged into the weights", switch["merged"]],
        [
            "answers equal to those of the task alone",
            f"{result['answers_unchanged']} of {result['tasks']}",
        ],
        ["answers of the base unchanged", "yes" if result["base_unchanged"] else "no"],
    ]
    return grid(["many tasks", ""], rows)


def matrices_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of the sweeps: one row for each of their cells."""
    rows = []
    for name, found in groups(experiment, entries).items():
        if not found:
            rows.append([name, "all", NOT_MEASURED, NOT_MEASURED])
            continue
        for line in found[0]["result"]["table"]:
            metric = found[0]["result"]["metric"]
            spread = line["spread"].get(metric)
            text = percent(line["mean"][metric]) + (f" ± {percent(spread)}" if spread else "")
            settings = ", ".join(f"{key}={value}" for key, value in line["settings"].items())
            rows.append([name, settings or "one cell", str(len(line["seeds"])), text])
    return grid(["sweep", "settings", "seeds", "dev accuracy, %"], rows)


def loss_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of `instruct`."""
    rows = [
        [
            name,
            number(found, "eval_loss", "{:.3f}".format),
            number(found, "exact_match", percent) if name.endswith("sums") else "-",
            number(found, "peak_bytes", size) if not name.startswith("base") else "-",
            minutes(found),
        ]
        for name, found in groups(experiment, entries).items()
    ]
    return grid(["method, rows", "held-out loss", "exact match, %", "peak memory", "min"], rows)


def text_table(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of `e2e`."""
    styles = {"eval_loss": "{:.3f}".format, "bleu": "{:.1f}".format, "chrf": "{:.1f}".format}
    rows = [
        [
            name,
            str(len(found)),
            *(number(found, key, styles[key]) for key in styles),
            minutes(found),
        ]
        for name, found in groups(experiment, entries).items()
    ]
    return grid(["method", "seeds", "held-out loss", "BLEU", "chrF", "min"], rows)


TABLES: Mapping[str, Callable[[Experiment, Sequence[Entry]], str]] = {
    "tasks": tasks_table,
    "latency": latency_table,
    "memory": memory_table,
    "sst2": accuracy_table,
    "matrices": matrices_table,
    "instruct": loss_table,
    "e2e": text_table,
    "rte": accuracy_table,
}


def section(experiment: Experiment, entries: Sequence[Entry]) -> str:
    """Return the table of an experiment and how it was measured."""
    command = f"`python tools/paper/run.py --only {experiment.name}`"
    lines = [TABLES[experiment.name](experiment, entries), ""]
    total = len(experiment.cells)
    left = sum(cell.minutes for cell in experiment.cells if find_cell(entries, cell) is None)
    which = "others" if entries else "cells"
    rest = f" The {which} take about {left:.0f} min of one core by estimate." if left else ""
    if not entries:
        return "\n".join([*lines, f"{command}: none of {total} cells is measured.{rest}"])
    seconds = sum(entry["seconds"] for entry in entries)
    measured = f"{len(entries)} of {total} cells, {seconds / 60:.1f} min.{rest}"
    lines.append(f"{command}: {measured} {_where(entries)}")
    return "\n".join(lines)


def _where(entries: Sequence[Entry]) -> str:
    """Return the devices and versions of the entries, each once, and the load of the machine."""
    texts = {}
    for entry in entries:
        at = entry["where"]
        versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
        threads = f"{at['threads']} of {at['cores']} cores"
        texts[f"{at['device']['name']} ({at['device']['kind']}), {threads}; {versions}"] = None
    loads = sorted({round(entry["where"]["load_average"]) for entry in entries})
    load = " to ".join(str(end) for end in dict.fromkeys((loads[0], loads[-1])))
    return f"{'; '.join(texts)}. Load average {load}."


def fill(text: str, folder: Path = MEASUREMENTS) -> str:
    """Return the page with every table made anew.

    Raises ValueError if the pair of markers of an experiment is not there exactly once.
    """
    for experiment in EXPERIMENTS:
        opening, closing = (f"<!-- {slash}paper:{experiment.name} -->" for slash in ("", "/"))
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise ValueError(f"{opening} and {closing} must be there exactly once")
        before, _, rest = text.partition(opening)
        made = section(experiment, read(experiment, folder))
        text = f"{before}{opening}\n{made}\n{closing}{rest.partition(closing)[2]}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write the tables of docs/paper.md.").parse_args()
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
