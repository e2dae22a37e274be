"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from qlora_cli.recipe.schema import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, of `steps` in total.

    It rises linearly to `train.lr` during the warm-up and then follows `train.schedule`.
    """
    warmup_steps = math.ceil(train.warmup * steps)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if train.schedule == "linear":
        return train.lr * (1 - progress)
    return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
