"""Findings about some of the encoded rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_cli.data.examples import Examples
from qlora_cli.data.findings import NAMED, Finding, finding


def about(code: str, examples: Examples, places: Any, detail: str = "") -> Iterator[Finding]:
    """Yield the finding about some examples, given as indices or a mask, if there are any."""
    places = np.asarray(places)
    indices = np.flatnonzero(places) if places.dtype == bool else places
    if len(indices):
        first = [examples.origin(int(place)) for place in indices[:NAMED]]
        yield finding(code, len(indices), first, detail)
