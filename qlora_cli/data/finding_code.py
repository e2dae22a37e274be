"""One kind of finding of the data checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    name: the word that `--allow` takes. severity: an error stops a job, a warning is shown. share:
    of all rows from which on the rows are reported; in fewer, it is usually intended.
    """

    name: str
    severity: Severity
    what: str
    remedy: str
    share: float = 0.0
