"""All errors that the program reports to its user.

QloraError                 exit 1    the job failed while it ran
+- InputError              exit 2    something that the user wrote or named is wrong
|  +- UsageError                     the command line: an unknown name, a folder in use
|  +- ModelError                     the base model: family, files, targets, tokenizer
|  +- ProblemsError                  several problems, reported together
|     +- RecipeError                 the recipe: every problem with its file, line and key
|     +- DataError                   the rows: every problem with its file and line
+- ProcessLost             exit 1    another process of the same job has ended
+- NotFinite               exit 1    training diverged: a loss or a weight is NaN or infinite
+- DoesNotFit              exit 3    the job needs more memory than the device has
|  +- MicroBatchTooLarge             a pass ran out of memory; smaller micro-batches may fit
+- VerificationFailed      exit 4    the merged model does not match the trained model
+- Interrupted             exit 130  the user pressed Ctrl-C

An error has three parts: what is wrong, where (file, line, key) and what to do about it (hint).
Errors of other libraries are converted at the call that raises them. The command line only prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QloraError(Exception):
    """Base class of all errors.

    what: what is wrong, without a capital letter and a full stop.
    where: the file, line, key or option that it is about, such as `recipe.yaml:12: train.lr`.
    hint: what the user can do about it.
    """

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
    """Something that the user wrote or named is wrong."""

    exit_code = 2


class UsageError(InputError):
    """A command line that cannot be carried out."""


class ModelError(InputError):
    """A base model that cannot be used: unknown family, missing or damaged file, unknown target."""


@dataclass(frozen=True)
class Problem:
    """One of several problems in an error.

    where: its place, such as `recipe.yaml:12: train.lr` or `rows.jsonl:42`.
    what: what is wrong.
    hint: what the user can do about it.
    """

    where: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class ProblemsError(InputError):
    """Several problems that are reported together. what: the line above the list of problems."""

    def __init__(self, what: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.what, *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, f"  {self.hint}"] if self.hint else lines)


class RecipeError(ProblemsError):
    """A recipe that is not valid, with every problem of it."""


class DataError(ProblemsError):
    """Rows that cannot be used, each with its file and line."""


class ProcessLost(QloraError):
    """Another process that trains the same job has ended."""


class NotFinite(QloraError):
    """Training diverged: the loss, a gradient or a trained weight is NaN or infinite."""


class DoesNotFit(QloraError):
    """The job needs more memory than the device has."""

    exit_code = 3


class MicroBatchTooLarge(DoesNotFit):
    """The forward or backward pass of a micro-batch ran out of memory; no weight has changed."""


class VerificationFailed(QloraError):
    """A merged checkpoint does not match the trained model, or does not fit its dtype."""

    exit_code = 4


class Interrupted(QloraError):
    """The user stopped the job; completed steps are stored in a checkpoint."""

    exit_code = 130
