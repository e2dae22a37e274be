"""The LoRA paper's arithmetic for a plan: Hu et al. 2021, section 4.2, "practical benefits".

For GPT-3 175B with rank 4 on q and v the paper tells: a checkpoint of about 35 MB instead of
350 GB, 10,000 times smaller, and 1.2 TB of memory for full fine-tuning against 350 GB for LoRA. It
does not itemize these; each line here says what it counts. Sizes are decimal, as the paper's.
"""

from __future__ import annotations

from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.results import Line
from qlora_cli.recipe.schema import Recipe

_HALF = 2
"""Bytes of a number in 16 bit."""


def arithmetic_of(recipe: Recipe, imagined: MemoryPlan) -> tuple[Line, ...]:
    """Counts and products only, no activations; nothing for full fine-tuning."""
    if recipe.adapter.method == "full":
        return ()
    total, trained = imagined.total_parameters, imagined.trainable_parameters
    moments_too = 3 * _HALF
    gradients_too = 4 * _HALF
    frozen = _HALF * total
    return (
        Line("trained parameters", trained, "", "rank x (inputs + outputs), every adapted matrix"),
        Line("checkpoint of the adapter", _HALF * trained, "B", "A and B in 16 bit"),
        Line("checkpoint of the base", frozen, "B", "every parameter in 16 bit"),
        Line("base / adapter", total / trained, "x", "both in 16 bit"),
        Line(
            "full fine-tuning",
            moments_too * total,
            "B",
            "weights and Adam's two moments, all in 16 bit",
        ),
        Line(
            "full fine-tuning with gradients",
            gradients_too * total,
            "B",
            "the same and a gradient in 16 bit (the paper tells 1.2 TB for GPT-3: between the two)",
        ),
        Line(
            "LoRA",
            frozen + gradients_too * trained,
            "B",
            "frozen weights in 16 bit; weights, gradients and moments of A and B only",
        ),
        Line(
            "full / LoRA",
            moments_too * total / (frozen + gradients_too * trained),
            "x",
            "without gradients; optimizer states of frozen weights are not kept",
        ),
    )
