"""The LoRA paper's memory arithmetic, applied to a plan.

Source: Hu et al. 2021, section 4.2, "practical benefits". For GPT-3 175B with rank 4 on q and v the
paper reports a checkpoint of about 35 MB instead of 350 GB, 10,000 times smaller, and 1.2 TB of
memory for full fine-tuning compared with 350 GB for LoRA. The paper does not itemize these figures;
each line here states what it counts. Sizes are decimal, as in the paper.
"""

from __future__ import annotations

from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.results import Line
from qlora_cli.recipe.schema import Recipe

_BYTES_16_BIT = 2
"""Bytes of a 16-bit number."""


def arithmetic_of(recipe: Recipe, plan: MemoryPlan) -> tuple[Line, ...]:
    """Return the arithmetic of a planned recipe, without activations.

    The result is empty if no linear has an adapter.
    """
    if not recipe.adapter.has_layers:
        return ()
    total, trained = plan.total_parameters, plan.trainable_parameters
    return *_checkpoints(total, trained), *_training(total, trained)


def _checkpoints(total: int, trained: int) -> tuple[Line, ...]:
    """Return the sizes of checkpoints. total, trained: numbers of parameters."""
    adapter, base = _BYTES_16_BIT * trained, _BYTES_16_BIT * total
    return (
        Line("trained parameters", trained, "", "rank x (inputs + outputs), every adapted matrix"),
        Line("checkpoint of the adapter", adapter, "B", "A and B in 16 bit"),
        Line("checkpoint of the base", base, "B", "every parameter in 16 bit"),
        Line("base / adapter", total / trained, "x", "both in 16 bit"),
    )


def _training(total: int, trained: int) -> tuple[Line, ...]:
    """Return the memory of training with Adam. total, trained: numbers of parameters."""
    full = 3 * _BYTES_16_BIT * total
    full_with_gradients = 4 * _BYTES_16_BIT * total
    lora = _BYTES_16_BIT * total + 4 * _BYTES_16_BIT * trained
    return (
        Line("full fine-tuning", full, "B", "weights and Adam's two moments, all in 16 bit"),
        Line(
            "full fine-tuning with gradients",
            full_with_gradients,
            "B",
            "the same with a gradient in 16 bit (the paper's 1.2 TB for GPT-3 is between the two)",
        ),
        Line(
            "LoRA",
            lora,
            "B",
            "frozen weights in 16 bit; weights, gradients and moments of A and B",
        ),
        Line(
            "full / LoRA",
            full / lora,
            "x",
            "full fine-tuning without gradients; frozen weights have no optimizer state",
        ),
    )
