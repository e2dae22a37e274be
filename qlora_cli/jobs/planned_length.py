"""How long a planned job is: its updates and tokens, from the rows, and its time if known."""

from __future__ import annotations

from typing import Any

from qlora_cli.data.packing import pack
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import QloraError
from qlora_cli.jobs.data_survey import row_loader, survey
from qlora_cli.jobs.measured_speed import measured_speed
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.plan.results import TimeEstimate
from qlora_cli.recipe.schema import Recipe


def planned_length(recipe: Recipe) -> tuple[TrainingLength | None, str | None]:
    """Return (length, None), or (None, problem) if the rows or the tokenizer cannot be read.

    Many rows are not all encoded: the length is then that of a random sample, by proportion.
    """
    try:
        loader = row_loader(recipe)
        if loader.tokenizer is None:
            return None, "the base has no tokenizer here"
        found = survey(recipe, loader.tokenizer, loader.limits)
    except QloraError as error:
        return None, str(error).splitlines()[0]
    lengths = found.lengths
    sequences = len(pack(list(lengths), recipe.data.seq_len)) if recipe.data.packing else None
    length = TrainingLength.of_totals(
        recipe,
        rows=found.of_all(len(lengths)),
        sequences=found.of_all(len(lengths) if sequences is None else sequences),
        tokens=found.of_all(sum(lengths)),
        trained_tokens=found.of_all(sum(found.targets)),
        is_estimate=found.is_sample,
    )
    return length, None


def estimated_time(
    recipe: Recipe, config: Any, profile: DeviceProfile, length: TrainingLength | None
) -> TimeEstimate:
    """Return the time of training at the speed of an earlier run of the same kind.

    recipe: without `auto` values. config: transformers' config of the base. length: of the job.
    The time is None without such a run on this device, or if the length is not known.
    """
    speed = measured_speed(recipe, config, profile)
    if speed is None or length is None:
        return TimeEstimate()
    total = length.tokens * length.epochs / speed.tokens_per_second
    return TimeEstimate(total / length.updates, total, speed.source)
