"""Choose a new recipe's settings of the section `train` from the number of rows and sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_cli.jobs.training_length import MIN_UPDATES
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Train
from qlora_cli.units import format_count

_MAX_BATCH = 16
"""Sequences per update at most."""
_MANY_ROWS = 1000
"""From this number of rows on, one pass over them is enough to begin with."""
_PASSES_OF_FEW_ROWS = 3
_EVALUATIONS = 10
"""Evaluations of a job on held-out rows, about."""
_LARGE_BASE = 20e9
_TINY_BASE = 50e6
"""Numbers of parameters from which on, and up to which, another learning rate is chosen."""
_LR_OF_LARGE_BASE = 1e-4
_LR_OF_INSTRUCT_BASE = 1e-4
_LR_OF_TINY_BASE = 3e-3
_LR_OF_PAIRS = 5e-6


@dataclass(frozen=True)
class Length:
    """How long a new recipe trains.

    rows, sequences: of one epoch, without held-out rows. has_eval: there are held-out rows.
    is_text: a row may be a long text, which is many sequences.
    """

    rows: int
    sequences: int
    has_eval: bool
    is_text: bool = False

    @property
    def batch(self) -> int:
        """Sequences per update: the largest power of two that makes `MIN_UPDATES` updates."""
        passes = self._usual_passes * self.sequences
        largest = max(1, min(_MAX_BATCH, passes // MIN_UPDATES))
        return 1 << (largest.bit_length() - 1)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.sequences / self.batch)

    @property
    def epochs(self) -> int:
        """Passes over the rows: the usual number, or as many as make `MIN_UPDATES` updates."""
        needed = math.ceil(MIN_UPDATES / self.updates_per_epoch)
        return max(self._usual_passes, needed)

    @property
    def updates(self) -> int:
        """Optimizer steps of the job."""
        return self.epochs * self.updates_per_epoch

    @property
    def _usual_passes(self) -> int:
        number = max(self.rows, self.sequences) if self.is_text else self.rows
        return 1 if number >= _MANY_ROWS else _PASSES_OF_FEW_ROWS

    def choices(self, about: str) -> list[Choice]:
        """Return the choices of passes and evaluations. about: `about ` or empty if exact."""
        rows = f"{about}{_count(self.rows, 'training row')}"
        updates = f"{about}{format_count(self.updates)} updates"
        reason = f"one pass over {rows} makes {updates}"
        if self.epochs > 1:
            reason = f"{self.epochs} passes over {rows} make {updates}; below about {MIN_UPDATES} "
            reason += "little is learned"
        choices = [Choice("train.epochs", self.epochs, reason)]
        if self.has_eval:
            every = max(1, self.updates // _EVALUATIONS)
            text = f"about {self.updates // every} evaluations; the weights with the lowest "
            text += "held-out loss are exported"
            choices.append(Choice("train.eval_every", every, text))
        return choices

    def batch_reason(self, about: str) -> str:
        """Return why an update has `batch` sequences."""
        return (
            f"{_count(self.batch, 'sequence')} per update; {about}"
            f"{_count(self.sequences, 'sequence')} of {about}{_count(self.rows, 'training row')} "
            f"make {about}{format_count(self.updates_per_epoch)} updates per epoch"
        )


def learning_rate(parameters: int, *, is_instruct: bool, is_preference: bool = False) -> Choice:
    """Return the learning rate for a base.

    parameters: of the base. is_instruct: its tokenizer has a chat template. is_preference: pairs of
    answers are trained.
    """
    default = Train.model_fields["lr"].default
    size = f"the base has {_billions(parameters)} parameters"
    if is_preference and parameters >= _TINY_BASE:
        rate, reason = _LR_OF_PAIRS, "the rate of the alignment handbook's DPO recipe with QLoRA"
    elif parameters >= _LARGE_BASE:
        rate, reason = _LR_OF_LARGE_BASE, f"{size}; the QLoRA paper's rate for 33B and 65B"
    elif parameters < _TINY_BASE:
        reason = f"{size}; the recipe of the embedded base, which is tiny too, learns with it"
        rate = _LR_OF_TINY_BASE
    elif is_instruct:
        reason = (
            f"the base has a chat template, as instruct models do: half of the default {default:g} "
            "changes its other abilities less; raise it if the loss falls slowly"
        )
        rate = _LR_OF_INSTRUCT_BASE
    else:
        rate, reason = default, f"{size}; the default, and the QLoRA paper's rate for 7B and 13B"
    return Choice("train.lr", rate, reason)


def _count(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"
