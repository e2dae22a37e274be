"""Suggest the most similar valid word in place of an unknown one (`did you mean ...?`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qlora_cli.recipe.describe import keys, sections


def nearest_word(word: str, words: Sequence[str]) -> str | None:
    """Return `did you mean bfloat16?` with the most similar word, or None if none is similar."""
    near = difflib.get_close_matches(word.lower(), words, n=1)
    return f"did you mean {near[0]}?" if near else None


def nearest_key(key: str) -> str:
    """Return a hint for an unknown dotted key: the most similar key, or a list of valid keys."""
    section, _, name = key.rpartition(".")
    known = keys() if section else (*keys(), *sections())
    near = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        or [candidate for candidate in known if candidate.rpartition(".")[2] == name]
        or _near_names(name)
    )
    if near:
        return f"did you mean {near[0]}?"
    model = sections().get(section)
    if model:
        return f"settings of {section}: {', '.join(model.fields_by_key())}"
    top_level = dict.fromkeys(candidate.partition(".")[0] for candidate in known)
    return f"top-level settings: {', '.join(top_level)}"


def _near_names(name: str) -> list[str]:
    by_name = {key.rpartition(".")[2]: key for key in keys()}
    return [by_name[near] for near in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
