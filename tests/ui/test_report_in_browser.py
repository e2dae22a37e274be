"""The report in a browser: complete without a network, and not wider than a phone.

Set QLORA_ARTIFACTS to a folder to keep the screenshot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_cli.ui import report
from tests.helpers import results

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
_MEASURE = """<script>addEventListener("load", () => {
const root = document.documentElement;
const broken = [...document.images].filter(image => !image.naturalWidth).length;
root.setAttribute("data-measured", `${root.scrollWidth} ${innerWidth} ${broken}`);
})</script>"""
"""Stores the widths of content and window and the number of figures that are not drawn."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_BROWSER is None, reason=f"no browser is on PATH: {', '.join(_NAMES)}"),
]


def _browse(folder: Path, page: str, width: int, *options: str) -> str:
    """Open a page without a network in a window of `width` pixels, and return stdout."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    assert _BROWSER is not None
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},4300", "--virtual-time-budget=2000", *options]
    done = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


@pytest.mark.parametrize("width", [500, 1000])  # Chromium's windows are at least 500 pixels wide.
def test_the_page_is_as_wide_as_the_window_and_its_figures_are_drawn(
    tmp_path: Path, width: int
) -> None:
    page = report.render(results.REPORT).replace("</body>", f"{_MEASURE}</body>")
    drawn = _browse(tmp_path, page, width, "--dump-dom")
    found = re.search(r'data-measured="(\d+) (\d+) (\d+)"', drawn)
    assert found is not None
    content, window, broken = map(int, found.groups())
    assert content <= window
    assert broken == 0


def test_a_screenshot_is_not_empty(tmp_path: Path) -> None:
    from PIL import Image

    kept = Path(os.environ.get("QLORA_ARTIFACTS", tmp_path))
    image_file = kept / "report.png"
    _browse(tmp_path, report.render(results.REPORT), 1000, f"--screenshot={image_file}")
    with Image.open(image_file) as image:
        assert image.width == 1000
        colors = image.convert("RGB").getcolors(maxcolors=2**24) or []
    assert len(colors) > 100
    assert max(count for count, _ in colors) < 0.98 * 1000 * 4300
