"""Read the results of tests from a JUnit file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST = 4000
"""Number of characters of a message that are kept."""


def read_tests(file: Path) -> dict[str, Any]:
    """Return counts, failure messages and recorded properties of a JUnit file."""
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
            yield (fault.get("message") or fault.text or kind)[:_LONGEST]
