"""One finding of the data checks, and the error of the findings that stop a job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_cli.data.finding_code import Severity
from qlora_cli.data.finding_codes import CODES
from qlora_cli.errors import DataError, Problem
from qlora_cli.units import format_count

NAMED = 3
"""Maximum number of rows that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One finding about the rows of a recipe.

    code: key of `CODES`. rows: number of rows; 0 if it is about all of them. first: origins of the
    first rows. text: one sentence for the user. remedy: what the user can do.
    """

    code: str
    severity: Severity
    rows: int
    first: tuple[str, ...]
    text: str
    remedy: str

    @property
    def line(self) -> str:
        """Return the finding, its remedy and its code in one line."""
        return f"{self.text}; {self.remedy} [{self.code}]"


def finding(code: str, rows: int = 0, first: Sequence[str] = (), detail: str = "") -> Finding:
    """Return the finding of a code.

    rows: number of rows. first: origins of them; the first `NAMED` are shown. detail: text behind
    the code's own.
    """
    kind = CODES[code]
    text = f"{kind.what}{f' ({detail})' if detail else ''}"
    if rows:
        names = ", ".join(first[:NAMED]) + (", ..." if rows > NAMED else "")
        text += f": {format_count(rows)} row{'' if rows == 1 else 's'} ({names})"
    return Finding(code, kind.severity, rows, tuple(first[:NAMED]), text, kind.remedy)


def stop_at_errors(findings: Iterable[Finding]) -> None:
    """Raise DataError listing the findings of severity `error`, if there are any."""
    errors = [found for found in findings if found.severity == "error"]
    if errors:
        options = " ".join(f"--allow {found.code}" for found in errors)
        raise DataError(
            "the rows cannot be meant like this:",
            [Problem(found.code, found.text, found.remedy) for found in errors],
            hint=f"change the rows; if they are meant like this, {options} trains on them",
        )
