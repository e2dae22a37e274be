"""`did you mean`: the nearest word that would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qlora_cli.recipe.describe import keys, sections


def nearest_word(word: str, words: Sequence[str]) -> str | None:
    """`did you mean bfloat16?`, or None where no word is near."""
    near = difflib.get_close_matches(word.lower(), words, n=1)
    return f"did you mean {near[0]}?" if near else None


def nearest_key(key: str) -> str:
    """What to write in place of an unknown dotted key: the nearest one, or what there is."""
    section, _, name = key.rpartition(".")
    known = keys() if section else (*keys(), *sections())
    near = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        or [other for other in known if other.rpartition(".")[2] == name]
        or _near_names(name)
    )
    if near:
        return f"did you mean {near[0]}?"
    model = sections().get(section)
    if model:
        return f"settings of {section}: {', '.join(model.model_fields)}"
    return f"there are {', '.join(dict.fromkeys(key.partition('.')[0] for key in known))}"


def _near_names(name: str) -> list[str]:
    by_name = {key.rpartition(".")[2]: key for key in keys()}
    return [by_name[near] for near in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
