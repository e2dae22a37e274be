"""How long a training job is: rows, sequences, updates, epochs and tokens, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_count

if TYPE_CHECKING:
    from qlora_cli.data.packing import BatchSchedule

MIN_UPDATES = 50
"""Below this number of optimizer steps a LoRA adapter, whose B starts at zero, hardly changes the
model at common learning rates, so a warning is given."""


@dataclass(frozen=True)
class TrainingLength:
    """The length of a job.

    updates: number of optimizer steps of the job. updates_per_epoch: the same of one epoch.
    sequences: number of sequences in an epoch. tokens, trained_tokens: of one epoch, with and
    without tokens that are not trained. grad_accum, micro_batch: the recipe's. has_fixed_steps: the
    recipe sets `train.steps` and not the epochs. is_estimate: the numbers are those of a sample of
    the rows, by proportion. has_labels: rows are trained on, and not tokens.
    """

    rows: int
    sequences: int
    updates_per_epoch: int
    updates: int
    tokens: int
    trained_tokens: int
    micro_batch: int
    grad_accum: int
    has_fixed_steps: bool
    is_estimate: bool = False
    has_labels: bool = False

    @classmethod
    def of(cls, recipe: Recipe, schedule: BatchSchedule, updates: int) -> TrainingLength:
        """Return the length of a recipe's job of `updates` optimizer steps."""
        tokens, trained = schedule.num_tokens
        length = cls.of_totals(recipe, schedule.num_rows, schedule.num_sequences, tokens, trained)
        return replace(length, updates=updates)

    @classmethod
    def of_totals(
        cls,
        recipe: Recipe,
        rows: int,
        sequences: int,
        tokens: int,
        trained_tokens: int,
        is_estimate: bool = False,
    ) -> TrainingLength:
        """Return the length of a recipe's job. The numbers are those of one epoch."""
        train = recipe.train
        per_epoch = math.ceil(sequences / (train.pass_size * train.grad_accum))
        return cls(
            rows=rows,
            sequences=sequences,
            updates_per_epoch=per_epoch,
            updates=train.steps or math.ceil(train.epochs * per_epoch),
            tokens=tokens,
            trained_tokens=trained_tokens,
            micro_batch=train.pass_size,
            grad_accum=train.grad_accum,
            has_fixed_steps=train.steps is not None,
            is_estimate=is_estimate,
            has_labels=recipe.task == "classification",
        )

    @property
    def epochs(self) -> float:
        """Number of passes over the rows."""
        return self.updates / self.updates_per_epoch

    def text(self) -> str:
        """Return one line: `40 rows in 2 sequences; 1 update in 1 epoch; 3,000 tokens (...)`."""
        total = round(self.tokens * self.epochs)
        trained = round(self.trained_tokens * self.epochs)
        about = "about " if self.is_estimate else ""
        return (
            f"{about}{_count(self.rows, 'row')} in {_count(self.sequences, 'sequence')}; "
            f"{_count(self.updates, 'update')} of up to "
            f"{_count(self.micro_batch * self.grad_accum, 'sequence')}, "
            f"{_count(self.epochs, 'epoch')}; {format_count(total)} tokens, "
            f"{format_count(trained)} {'labels' if self.has_labels else 'of them trained'}"
        )

    def warning(self) -> str | None:
        """Return a warning if there are too few updates to learn, with settings that help."""
        if self.updates >= MIN_UPDATES:
            return None
        advice = f"train.steps={MIN_UPDATES}" if self.has_fixed_steps else self._more_updates()
        return (
            f"warning: only {_count(self.updates, 'update')} of the weights; below about "
            f"{MIN_UPDATES} little is learned. Try {advice}"
        )

    def _more_updates(self) -> str:
        """Return the settings that make at least `MIN_UPDATES` updates, and how many they make."""
        accum = min(self.grad_accum, max(1, self.sequences // (MIN_UPDATES * self.micro_batch)))
        per_epoch = math.ceil(math.ceil(self.sequences / self.micro_batch) / accum)
        epochs = math.ceil(MIN_UPDATES / per_epoch)
        settings = [f"train.grad_accum={accum}"] if accum < self.grad_accum else []
        if epochs > self.epochs:
            settings.append(f"train.epochs={epochs}")
        updates = math.ceil(per_epoch * max(epochs, self.epochs))
        return (
            f"{' '.join(settings)}: {_count(updates, 'update')} (an update uses train.micro_batch "
            "x train.grad_accum sequences)"
        )


def _count(number: float, noun: str) -> str:
    text = format_count(int(number)) if number == int(number) else f"{number:.2f}"
    return f"{text} {noun}{'' if number == 1 else 's'}"
