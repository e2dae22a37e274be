"""`qlora generate`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.output import emit, importing, json_option, working


@click.command()
@click.argument("run_or_model")
@click.option("--prompt", required=True, help="The text to go on from.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Stop after so many tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@adapter_option
@click.option(
    "--use",
    "uses",
    multiple=True,
    metavar="NAME",
    help="Who answers: an adapter's name, `run` for the run's own adapter, `base` for none; may be "
    "repeated.  [default: every adapter in turn]",
)
@merged_option
@json_option
def generate(
    run_or_model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    adapters: dict[str, Path],
    uses: tuple[str, ...],
    merged: bool,
    as_json: bool,
) -> None:
    """Go on from a prompt with a run's folder or a model."""
    with importing():
        from qlora_cli.jobs import generate as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(
            run_or_model,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            observer=observer,
            adapters=adapters,
            uses=uses,
            merged=merged,
        )
    emit(result, as_json, tables.generation)
