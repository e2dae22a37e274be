"""Name the settings that need less memory when a training job runs out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qlora_cli.errors import DoesNotFit, MicroBatchTooLarge, QloraError
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.plan.advise import changes_that_fit
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.shortage import converted
from qlora_cli.units import format_bytes

_SHARE = 0.9
"""A change is named if the job then needs at most this share of what was planned for it."""
_NAMED_CHANGES = 3


@contextmanager
def shortage_explained(prepared: Prepared, planned: MemoryPlan) -> Iterator[None]:
    """Convert a lack of memory inside the block to DoesNotFit, with the changes that save memory.

    prepared: the job. planned: its plan, which fits the device; so another process, or memory that
    the plan does not include, has used what is missing.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError, MicroBatchTooLarge) as error:
        shortage = converted(error)
        if not isinstance(shortage, DoesNotFit):
            raise
        what, reason = shortage.what, shortage.hint
        if isinstance(error, MicroBatchTooLarge):
            what += "; the micro-batches have one row each and cannot be divided"
    # After the except block, so that the tensors of the failed pass are freed.
    changes = _changes(prepared, planned)
    hint = f"{reason}. The job was planned with {format_bytes(planned.peak_bytes)}"
    if changes:
        hint += f"; less is needed with {' or '.join(changes)} (a new run: add output=...)"
    raise DoesNotFit(what, hint=hint)


def _changes(prepared: Prepared, planned: MemoryPlan) -> list[str]:
    """Return the changes of the recipe with which the plan is smaller, as overrides."""
    profile = prepared.profile
    missing = max(0, profile.usable_bytes - int(_SHARE * planned.peak_bytes))
    smaller = replace(profile, context_bytes=profile.context_bytes + missing)
    try:
        advice = changes_that_fit(prepared.recipe, Planner(prepared.config, smaller))
    except (QloraError, RuntimeError, MemoryError):  # The first error is reported then.
        return []
    return [f"{item.change} ({format_bytes(item.peak_bytes)})" for item in advice if item.fits][
        :_NAMED_CHANGES
    ]
