"""`qlora generate`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.output import emit, fast_import, job_observer, json_option


@click.command()
@click.argument("run_or_model")
@click.option("--prompt", required=True, help="Text to continue; no chat template is applied.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 selects the most likely token at each step.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed for temperatures above 0."
)
@adapter_option
@click.option(
    "--use",
    "uses",
    multiple=True,
    metavar="NAME",
    help="Generate with this adapter: a NAME from --adapter, `run` for the run's own adapter, "
    "`base` for none. May be repeated.  [default: each adapter in turn]",
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
    """Continue a prompt with a run or a model.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`.
    """
    with fast_import():
        from qlora_cli.jobs import generate as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
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
