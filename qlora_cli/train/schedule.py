"""What happens at which optimizer step: the learning rate and evaluations."""

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


def steps_between(eval_every: float | None, steps_per_epoch: int) -> int | None:
    """Return the optimizer steps between two evaluations; None for none during training.

    eval_every: the setting: an integer number of steps, or a share of an epoch.
    """
    if isinstance(eval_every, float):
        return max(1, round(eval_every * steps_per_epoch))
    return eval_every
