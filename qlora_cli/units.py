"""Format bytes, durations, counts and ratios as text, and parse sizes.

All output uses these functions, so that every size has a unit and a GiB is 1024^3 bytes everywhere.
"""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?|B)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def format_bytes(num_bytes: int) -> str:
    """Format a size with binary units and three significant digits: `5.70 GiB`, `512 B`."""
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if size < KIB:
        return f"{sign}{size} B"
    value, unit = float(size), "B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= KIB
        # 999.5 and more would be rounded to four digits, so the next unit is used.
        if value < 999.5 or unit == "TiB":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {unit}"


def format_decimal(num_bytes: int) -> str:
    """Format a size with powers of 1000, as papers do: `37.7 MB`, `1.05 TB`."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = next(p for p in (1, 2, 3, 4) if num_bytes < 999.5 * 1000**p or p == 4)
    return f"{num_bytes / 1000**power:.3g} {' kMGT'[power]}B"


def parse_bytes(text: str) -> int:
    """Parse a size in bytes: `24GiB`, `24G`, `24 GB` or `8000000000`.

    K, M, G and T are powers of 1024. Raises ValueError if the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as 24GiB")
    unit = (match["unit"] or "").upper().rstrip("B").rstrip("I")
    return int(float(match["number"]) * KIB ** _POWERS[unit])


def format_duration(seconds: float) -> str:
    """Format a duration: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(number: int) -> str:
    """Format a count exactly, with digits grouped by thousands: `8,030,261,248`."""
    return f"{number:,}"


def format_figure(value: float) -> str:
    """Format a positive number with three significant digits and no exponent: `0.0195`, `1,050`."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def format_rows(number: int) -> str:
    """Format a number of rows: `1 row`, `1,319 rows`."""
    return f"{format_count(number)} row{'' if number == 1 else 's'}"


def format_ratio(ratio: float, digits: int = 1) -> str:
    """Format a ratio: `3.1x`. digits: decimal places; ratios of 100 and more have none."""
    return f"{ratio:.{digits}f}x" if ratio < 100 else f"{ratio:,.0f}x"
