"""The options of decoding, which `generate` and `chat` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


_COMMON = (
    click.option(
        "--temperature",
        type=click.FloatRange(min=0.0),
        default=0.0,
        show_default=True,
        help="Sampling temperature; 0 selects the most likely token at each step.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0.0, max=1.0, min_open=True),
        help="Sample from the most likely tokens whose probabilities add up to this; needs "
        "--temperature above 0.  [default: the model's own setting]",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End an answer before this text. May be repeated.",
    ),
)


def sampling_options(max_new_tokens: int, seed: int | None) -> Callable[[_F], _F]:
    """Return a decorator that adds the options.

    max_new_tokens: default of this option. seed: default; None for another seed each time.
    """
    seed_text = {} if seed is not None else {"show_default": "another one each time"}
    options = [
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=max_new_tokens,
            show_default=True,
            help="Maximum number of tokens of an answer.",
        ),
        *_COMMON,
        click.option(
            "--seed",
            type=int,
            default=seed,
            help="Random seed for temperatures above 0.",
            **{"show_default": True, **seed_text},  # type: ignore[arg-type]
        ),
    ]

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


system_option = click.option(
    "--system", metavar="TEXT", help="System prompt; needs a chat template that has one."
)
