"""Every error a user can meet, in one tree.

QloraError                 exit 1   the job failed while it ran
+- InputError              exit 2   something the user wrote or named is wrong
|  +- UsageError                    a command line: an unknown name, a folder already in use
|  +- RecipeError                   a recipe: every problem of it, at once
|  +- DataError                     rows: file and line of each
|  +- ModelError                    a base that cannot be used: family, files, targets, tokenizer
+- NotFinite               exit 1   training diverged: a loss or a weight is NaN or infinite
+- DoesNotFit              exit 3   the plan or the device says that the job is too large
+- VerificationFailed      exit 4   the merged model is not the trained one
+- Interrupted             exit 130 Ctrl-C, after the checkpoint was written

An error says what is wrong, where (file, line, key) and what to do. Foreign errors are translated
where they arise, never by the command line, which prints whatever stands here and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QloraError(Exception):
    """What went wrong, where, and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n  {self.hint}" if self.hint else "")


class InputError(QloraError):
    """Something the user wrote or named is wrong."""

    exit_code = 2


class UsageError(InputError):
    """A command line that cannot be obeyed."""


class ModelError(InputError):
    """A base that cannot be used: unknown family, missing or damaged files, unknown targets."""


@dataclass(frozen=True)
class Problem:
    """One fault among several.

    where: `recipe.yaml:12: train.lr` or `rows.jsonl:42`.
    """

    where: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class ProblemsError(InputError):
    """Several faults found in one reading, reported together."""

    def __init__(self, what: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.what, *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, f"  {self.hint}"] if self.hint else lines)


class RecipeError(ProblemsError):
    """A recipe with problems; all of them at once."""


class DataError(ProblemsError):
    """Rows that cannot be trained on, each with its file and line."""


class NotFinite(QloraError):
    """Training diverged: the loss, the gradients or trained values are NaN or infinite."""


class DoesNotFit(QloraError):
    """The job needs more memory than there is."""

    exit_code = 3


class VerificationFailed(QloraError):
    """A merged checkpoint that is not what was trained."""

    exit_code = 4


class Interrupted(QloraError):
    """The user stopped the job; what was trained so far is safe."""

    exit_code = 130
