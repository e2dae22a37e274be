"""Checks for rows that occur more than once, in the training rows or in both sets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encoded_dataset import OWN_PROMPTS, EncodedDataset
from qlora_cli.data.examples import Examples
from qlora_cli.data.findings import Finding
from qlora_cli.data.row_findings import about
from qlora_cli.data.similar_rows import similar_rows

_HELD_OUT_PROMPTS = 0.01
"""Share of the held-out rows whose prompts are reported if they are trained on, too."""
_COMPARED = 500_000
"""Rows of each set that are compared for similar ones; more need too much memory."""


def duplicates(dataset: EncodedDataset) -> Iterator[Finding]:
    """Check for rows that are equal to an earlier one, or differ only in punctuation."""
    examples = dataset.examples
    words = examples.encoded.words[examples.rows]
    same = _repeats(examples, dataset.facts.digest)
    near = _repeats(examples, words) & ~same & (words != 0) & ~dataset.is_split
    for code, repeated, values in (
        ("duplicates", same, dataset.facts.digest),
        ("near-duplicates", near, words),
    ):
        if repeated.any():
            place = int(np.flatnonzero(repeated)[0])
            earlier = examples.origin(int(np.flatnonzero(values == values[place])[0]))
            detail = f"{examples.origin(place)} is like {earlier}"
            yield from about(code, examples, repeated, detail)


def similar(dataset: EncodedDataset) -> Iterator[Finding]:
    """Check for rows and held-out rows that differ from an earlier row in one word."""
    sets = [rows.take(slice(_COMPARED)) for rows in (dataset.examples, dataset.held_out) if rows]
    examples = sets[0]
    found = {a: b for a, b in similar_rows(*sets).items() if b < len(examples)}
    first = 0
    for code, rows in zip(("similar-rows", "held-out-similar"), sets, strict=False):
        places = [place for place in found if first <= place < first + len(rows)]
        # Rows that differ only in punctuation have a finding of their own.
        places = [p for p in places if _words(rows, p - first) != _words(examples, found[p])]
        if places:
            earlier = examples.origin(found[places[0]])
            detail = f"{rows.origin(places[0] - first)} is like {earlier}"
            yield from about(code, rows, np.array(places) - first, detail)
        first += len(rows)


def _words(examples: Examples, place: int) -> int:
    """Return the digest of an example's words; the negative place if it has none."""
    return int(examples.encoded.words[examples.rows[place]]) or -1 - place


def held_out_rows(dataset: EncodedDataset) -> Iterator[Finding]:
    """Check for held-out rows, or their prompts, that are also trained on."""
    facts, held_out = dataset.held_out_facts, dataset.held_out
    if held_out is None or facts is None:
        return
    train, examples = dataset.facts, dataset.examples
    words = held_out.encoded.words[held_out.rows]
    is_near = np.isin(words, examples.encoded.words[examples.rows]) & (words != 0)
    shared = np.isin(facts.digest, train.digest) | (is_near & (held_out.pieces == 0))
    yield from about("held-out-in-train", held_out, shared)
    prompts = train.prompt[dataset.has_prompt]
    if len(np.unique(prompts)) < OWN_PROMPTS * len(prompts):
        return
    same = np.isin(facts.prompt, prompts) & (facts.first > 1) & ~shared & (held_out.pieces == 0)
    if same.sum() > _HELD_OUT_PROMPTS * len(held_out):
        yield from about("held-out-prompts", held_out, same)


def _repeats(examples: Examples, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each example whether an earlier one of another origin has the same digest."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    # A row that its weight repeats has the same origin.
    places = np.stack([*examples.where(), examples.piece])
    result: NDArray[np.bool_] = (places != places[:, first[inverse]]).any(axis=0)
    return result
