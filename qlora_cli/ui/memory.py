"""The memory tables: the phases of a job, this job next to full fine-tuning, several methods.

Each table is built once, as a `Grid` of text, by `phase_grid`, `method_grid` or `comparison_grid`.
The terminal prints a grid with rich, and the HTML report renders the same grid. A new row or column
is therefore added in these functions only. The rows are the categories of the ledger; their labels
are in `ui/categories.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.memory.ledger import CATEGORIES, Ledger, peak_phase
from qlora_cli.plan.results import Compared
from qlora_cli.ui.categories import category_label
from qlora_cli.ui.memory_facts import counters, device_text, saving
from qlora_cli.units import format_bytes, format_ratio

_HEADING_WIDTH = 11
"""Characters per line of a heading in a table with more than two columns, as in `fine-tuning`."""
_MIN_SHARE = 1e-5
"""A category with a smaller share of the peak is shown as `-`: full fine-tuning has a frozen table
of 256 bytes, and its line would be taken for a quantized base."""
_METHODS = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "head": "head alone"}


@dataclass(frozen=True)
class Grid:
    """A memory table as text.

    columns: headings. rows: label of a category -> one cell per column. footer: label -> one cell
    per column, shown below the categories; the first line is the peak, the sum of the categories.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    footer: dict[str, tuple[str, ...]] = field(default_factory=dict)


def phase_grid(ledger: Ledger) -> Grid:
    """Return the table of a job: one column per phase, the categories at the phase's peak."""
    live = tuple(format_bytes(phase.live_bytes) for phase in ledger.phases)
    return _grid(peak_by_phase(ledger), {"live at the end": live})


def method_grid(ledger: Ledger) -> Grid:
    """Return the table of two columns: the peak of full fine-tuning and the peak of this job."""
    return _grid(peak_by_method(ledger), {})


def comparison_grid(compared: Sequence[Compared]) -> Grid:
    """Return the table of several methods, with full fine-tuning's peak divided by each peak."""
    columns = {method_name(method.method, method.bits): method.at_peak for method in compared}
    ratios = tuple(format_ratio(method.ratio) for method in compared)
    return _grid(columns, {"full / this": ratios})


def peak_by_phase(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Return name of each phase -> bytes by category at the phase's peak."""
    return {phase.name.replace("_", " "): phase.at_peak for phase in ledger.phases}


def peak_by_method(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Return bytes by category at the peak of full fine-tuning and of this job.

    The keys are headings: `LoRA, 4-bit base (measured)`.
    """
    return {
        f"{name}{method_name(peak.method, peak.bits)} ({peak.source})": peak.at_peak
        for name, peak in (("", ledger.before), ("this job: ", ledger.after))
    }


def method_name(method: str, bits: int | None) -> str:
    """Return `LoRA, 4-bit base` or, without a frozen base, `full fine-tuning`.

    bits: of the base; None for a mixed base.
    """
    name = _METHODS.get(method, method)
    if method == "full":
        return name
    return f"{name}, {f'{bits}-bit' if bits else 'mixed'} base"


def peak_phase_name(ledger: Ledger) -> str:
    """Return the name of the phase in which the training job's memory is at its peak.

    A plan also has the phase `merge`, which is another command and not part of the job's peak.
    """
    phases = tuple(phase for phase in ledger.phases if phase.name != "merge")
    return peak_phase(phases).name.replace("_", " ")


def phase_table(ledger: Ledger) -> RenderableType:
    """Render the phases of a job, the device and its counters."""
    instrument = f"; {ledger.instrument}" if ledger.instrument else ""
    title = f"Memory on {device_text(ledger)}{instrument}"
    sizes = [f"{name} {size}" for name, size in counters(ledger).items()]
    lines = [Text(f"Counters: {', '.join(sizes)}")] if sizes else []
    return Group(Text(title, style="bold"), _table(phase_grid(ledger)), *lines)


def method_table(ledger: Ledger) -> RenderableType:
    """Render full fine-tuning next to this job, category by category, and the ratio."""
    title = Text("Peak memory of full fine-tuning and of this job", style="bold")
    return Group(title, _table(method_grid(ledger)), Text(saving(ledger), style="bold"))


def comparison_table(compared: Sequence[Compared]) -> RenderableType:
    """Render several methods on the same data and batch size."""
    title = Text("Peak memory of each method, on the same data and batch size", style="bold")
    return Group(title, _table(comparison_grid(compared)))


def _grid(columns: Mapping[str, Mapping[str, int]], footer: Mapping[str, tuple[str, ...]]) -> Grid:
    """Build a table; categories that are zero in every column are left out.

    columns: heading -> bytes by category. footer: lines below the line of peaks.
    """
    rows = {}
    totals = [sum(at_peak.values()) for at_peak in columns.values()]
    for category in CATEGORIES:
        sizes = [at_peak.get(category, 0) for at_peak in columns.values()]
        if any(sizes):
            cells = (_cell(*pair) for pair in zip(sizes, totals, strict=True))
            rows[category_label(category)] = tuple(cells)
    peaks = tuple(format_bytes(total) for total in totals)
    return Grid(tuple(columns), rows, {"peak": peaks, **footer})


def _cell(size: int, total: int) -> str:
    return format_bytes(size) if size > _MIN_SHARE * total else "-"


def _table(grid: Grid) -> Table:
    """Return the table for a terminal. With many columns, headings and labels are wrapped."""
    is_wide = len(grid.columns) > 2
    table = Table(box=box.SIMPLE, show_footer=True, pad_edge=False, collapse_padding=is_wide)
    table.add_column("", footer="\n".join(grid.footer))
    for index, name in enumerate(grid.columns):
        footer = "\n".join(cells[index] for cells in grid.footer.values())
        heading = _wrapped(name) if is_wide else name
        table.add_column(heading, footer=footer, justify="right", no_wrap=is_wide)
    for label, cells in grid.rows.items():
        table.add_row(label, *cells)
    return table


def _wrapped(heading: str) -> str:
    return textwrap.fill(heading, _HEADING_WIDTH, break_long_words=False, break_on_hyphens=False)
