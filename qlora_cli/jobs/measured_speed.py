"""The speed of finished runs, kept in the cache, from which the time of a like run is estimated."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.files import cache
from qlora_cli.files.atomic import PARSE_ERRORS, write_json
from qlora_cli.recipe.gpus import short_name
from qlora_cli.recipe.schema import Recipe

_OF_ADAPTER = {"method", "rank", "ranks", "targets", "dropout", "dtype", "prefix"}
_OF_TRAIN = {
    "micro_batch",
    "activation_checkpointing",
    "offload_inputs",
    "optimizer",
    "update_in_backward",
}
"""Settings of these sections that change the work of a token. The chunk of the loss is left out,
because a plan without the rows may choose another one than the run."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed of training in a finished run. date: of its end, such as 2026-05-31."""

    tokens_per_second: float
    date: str

    @property
    def source(self) -> str:
        """Return how the figure was obtained."""
        return (
            f"from {self.tokens_per_second:,.0f} tokens/s, measured on {self.date} on this device "
            "with the same base, adapter and batches"
        )


def record_speed(
    recipe: Recipe, config: Any, profile: DeviceProfile, tokens_per_second: float
) -> None:
    """Store the speed of a finished run in place of an earlier one; without a cache, do nothing.

    recipe: without `auto` values. config: transformers' config of the base. profile: of the device.
    """
    file = _file(recipe, config, profile)
    description = f"{config.model_type} on {profile.name}: {tokens_per_second:,.0f} tokens/s"
    content = {
        "description": description,
        "tokens_per_second": tokens_per_second,
        "date": time.strftime("%Y-%m-%d"),
    }
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def measured_speed(recipe: Recipe, config: Any, profile: DeviceProfile) -> MeasuredSpeed | None:
    """Return the speed of the last like run on this device; None if there is none."""
    try:
        content = json.loads(_file(recipe, config, profile).read_text())
        speed = float(content["tokens_per_second"])
        return MeasuredSpeed(speed, str(content["date"])) if speed > 0 else None
    except (OSError, *PARSE_ERRORS):
        return None


def _file(recipe: Recipe, config: Any, profile: DeviceProfile) -> Path:
    """Return the file of the speed of runs with the same work per token on the same device."""
    threads = 0 if profile.kind == "cuda" else torch.get_num_threads()
    count = [profile.count] if profile.count > 1 else []
    key = cache.key_of(
        {
            "device": [profile.kind, short_name(profile.name), threads, *count],
            "config": config.to_json_string(),
            "base": recipe.base.model_dump(mode="json"),
            "adapter": recipe.adapter.model_dump(mode="json", include=_OF_ADAPTER),
            "task": recipe.task,
            "data": recipe.data.model_dump(mode="json", include={"seq_len", "packing"}),
            "train": recipe.train.model_dump(mode="json", include=_OF_TRAIN),
        }
    )
    return cache.entry_folder(cache.SPEEDS, key) / cache.ENTRY
