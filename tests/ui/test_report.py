"""The HTML report of a run: complete, and in one file that loads nothing else."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

from qlora_cli.errors import QloraError
from qlora_cli.memory.ledger import InstrumentCost
from qlora_cli.ui import report
from qlora_cli.ui.categories import CATEGORY_STYLES
from qlora_cli.units import GIB, MIB
from tests.helpers import results

pytestmark = pytest.mark.slow


class Reader(HTMLParser):
    """Collects what a page would load, and checks that its elements are closed."""

    VOID: ClassVar = {"meta", "img", "link", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "iframe", "link")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(results.REPORT)


def test_the_page_loads_nothing_else(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.loaded) == 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in reader.loaded)
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_the_figures_load_nothing_else(page: str) -> None:
    for encoded in re.findall(r"base64,([\w+/=]+)", page):
        svg = base64.b64decode(encoded).decode()
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


@pytest.mark.parametrize(
    "expected",
    [
        "meta-llama/Llama-3.1-8B",
        "NVIDIA GeForce RTX 4090 (24.0 GiB)",
        "less peak memory than full fine-tuning",
        "LoRA, 4-bit base (measured)",
        "units &amp; &lt;b&gt;",
        "<code>adapter.targets</code></td><td>q, v",
        "2.13.0",
        "reserved by torch",
        "1.00 GiB more: freed blocks that torch&#39;s caching allocator keeps, and fragmentation",
        "1.00 GiB more: the CUDA context",
        "100.0% of the peak, other 0 B",
        "The step with the highest peak, step 30.",
        "live at the end</th>",
        "model.norm",
        "1.934 in the first step",
        "Wh",
    ],
)
def test_the_page_contains(page: str, expected: str) -> None:
    assert expected in page


def test_the_same_run_gives_the_same_page(page: str) -> None:
    assert report.render(results.REPORT) == page


def test_a_run_without_steps_has_a_page_without_curves() -> None:
    reader = Reader()
    reader.feed(report.render(replace(results.REPORT, metrics=())))
    assert len(reader.loaded) == 4


def test_a_run_without_a_timeline_has_a_page_without_its_figures(tmp_path: Path) -> None:
    older = replace(results.REPORT, timeline=(), png=tmp_path / "memory.png")
    reader = Reader()
    reader.feed(report.render(older))
    assert len(reader.loaded) == 4
    report.write(older)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_how_reliable_its_figures_are() -> None:
    ledger = replace(
        results.LEDGER,
        before=replace(results.LEDGER.before, source="measured"),
        before_planned_bytes=100 * GIB,
        floor_bytes=5 * GIB,
        instrument_cost=InstrumentCost(50, 4, 2.0, 1.5, 3 * MIB),
        notes=("The run was resumed after step 2 & finished.",),
    )
    page = report.render(replace(results.REPORT, ledger=ledger))
    for expected in (
        "lower bound</th><td>5.00 GiB (packed weights",
        "the peak is 1.12x of it",
        "planned 100 GiB, measured 106 GiB (-5.7%)",
        "tracker on for 4 of 50 steps; 2.0 s per step with it, 1.5 s without it for as many "
        "tokens; its records took 3.00 MiB of CPU memory",
        "resumed after step 2 &amp; finished",
    ):
        assert expected in page


def test_neighbouring_colors_differ_in_lightness() -> None:
    def lightness(color: str) -> float:
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [lightness(style.color) for style in CATEGORY_STYLES.values()]
    assert all(abs(a - b) > 0.15 for a, b in pairwise(values))


def test_a_page_that_cannot_be_written_is_an_error_naming_its_path(tmp_path: Path) -> None:
    with pytest.raises(QloraError) as caught:
        report.write(replace(results.REPORT, html=tmp_path / "nowhere" / "page.html"))
    assert "nowhere" in (caught.value.where or "")


def test_page_and_image_are_written_completely_and_reproducibly(tmp_path: Path, page: str) -> None:
    written = replace(results.REPORT, html=tmp_path / "page.html", png=tmp_path / "memory.png")
    report.write(written)
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "memory.png"}
    assert (tmp_path / "page.html").read_text() == page
    image = (tmp_path / "memory.png").read_bytes()
    report.write(replace(written, html=None))
    assert (tmp_path / "memory.png").read_bytes() == image
