"""Choose the rows that are trained and held out: sources, weights, shares and limits.

The order is: read all rows, take the share of `data.eval` away, repeat or sample each source by its
weight, limit the number of rows by `data.max_rows`. All random choices depend only on `data.seed`
and the number of rows, so every command chooses the same rows. Chosen rows keep their order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.formats import FORMATS, format_of
from qlora_cli.data.row_store import Rows
from qlora_cli.data.rows import read_places
from qlora_cli.errors import DataError, InputError, Problem
from qlora_cli.events import Observer, Silent
from qlora_cli.recipe.schema import Data, Source, Sources
from qlora_cli.recipe.suggest import nearest_word
from qlora_cli.units import format_count, format_rows

_SILENT = Silent()
_MIN_CUT_CHARACTERS = 1000
"""A single text with fewer characters is not divided into a training part and a held-out part."""


@dataclass(frozen=True)
class SourceCount:
    """The rows of one source. read: number of rows in it. used: number of training rows from it."""

    path: str
    weight: float
    read: int
    used: int


@dataclass(frozen=True)
class DataRows:
    """Rows of a recipe, in the order of their sources.

    held_out: None if `data.eval` is null. sources: of the training rows.
    """

    train: Rows
    held_out: Rows | None
    sources: tuple[SourceCount, ...]


def choice_notes(data: Data, sources: Sequence[SourceCount], held_out: int) -> list[str]:
    """Return one line per choice of rows that the settings made.

    sources: of the training rows. held_out: number of held-out rows.
    """
    notes = []
    if len(sources) > 1 or any(source.weight != 1 for source in sources):
        counts = ", ".join(
            f"{format_count(source.used)} from {source.path}"
            + (f" (weight {source.weight:g})" if source.weight != 1 else "")
            for source in sources
        )
        notes.append(f"training rows: {counts}")
    if isinstance(data.eval, float):
        verb = "is" if held_out == 1 else "are"
        chosen = f"{format_rows(held_out)} {verb} held out and not trained on"
        chosen += f" (data.seed={data.seed})"
        if sum(source.read for source in sources) == 1:
            chosen = "the end of the only text is held out and not trained on"
        notes.append(f"data.eval={data.eval:g}: {chosen}")
    if data.max_rows is not None:
        used = format_count(sum(source.used for source in sources))
        notes.append(
            f"data.max_rows={data.max_rows}: {used} training rows are used (data.seed={data.seed})"
        )
    return notes


def read_data(data: Data, folder: Path | None = None, observer: Observer = _SILENT) -> DataRows:
    """Return the rows that a recipe's data section chooses. folder, observer: as `read_places`.

    Raises InputError if a file or dataset cannot be read or a setting cannot be applied, DataError
    listing every broken row.
    """
    _check_columns(data)
    sources = sources_of(data.train)
    read = _read(sources, data, "data.train", folder, observer)
    held_out: Rows | None = None
    rest = read
    if isinstance(data.eval, float):
        held_out, rest = _share(read, data.eval, data)
    elif data.eval is not None:
        held_out = _read_eval(data.eval, data, folder, observer)
    weighted = [
        _weighted(rows, source, f"{data.seed}/{number}")
        for number, (rows, source) in enumerate(zip(rest, sources, strict=True))
    ]
    train = _limited(weighted, data)
    counts = tuple(
        SourceCount(source.path, source.weight, len(rows), len(used))
        for source, rows, used in zip(sources, read, train, strict=True)
    )
    return DataRows(Rows.joined(train), held_out, counts)


def read_held_out(data: Data) -> Rows:
    """Return the held-out rows of a recipe, whose `data.eval` is not null. Errors as `read_data`.

    If they are a file of their own, the training rows are not read.
    """
    assert data.eval is not None
    if isinstance(data.eval, float):
        held_out = read_data(data).held_out
        assert held_out is not None
        return held_out
    return _read_eval(data.eval, data, None, _SILENT)


def _read_eval(setting: Sources, data: Data, folder: Path | None, observer: Observer) -> Rows:
    sources = sources_of(setting)
    if any(source.weight != 1 for source in sources):
        raise InputError("weights apply to data.train only", where="data.eval")
    return Rows.joined(_read(sources, data, "data.eval", folder, observer))


def sources_of(setting: Sources) -> list[Source]:
    """Return the sources that `data.train` or `data.eval` names."""
    items = [setting] if isinstance(setting, str) else setting
    return [Source(path=item) if isinstance(item, str) else item for item in items]


def sources_text(setting: Sources | float | None) -> str:
    """Return `data.train` or `data.eval` as text for people."""
    if setting is None or isinstance(setting, float):
        return "none" if setting is None else f"data.eval={setting:g}"
    return ", ".join(source.path for source in sources_of(setting))


def _read(
    sources: Sequence[Source], data: Data, key: str, folder: Path | None, observer: Observer
) -> list[Rows]:
    places = [source.path for source in sources]
    try:
        return read_places(places, columns=data.columns, folder=folder, observer=observer)
    except InputError as error:
        if isinstance(error, DataError) or error.where:
            raise
        hint = error.hint
        if key == "data.eval":
            share = "data.eval=0.02 holds out a share of the training rows"
            hint = f"{hint}; {share}" if hint else share
        raise InputError(error.what, where=key, hint=hint) from error


def _check_columns(data: Data) -> None:
    """Raise InputError if `data.columns` names a field that the format does not have."""
    formats = FORMATS.values() if data.format == "auto" else [FORMATS[data.format]]
    known = {name for item in formats for name in (*item.required, *item.optional)}
    owner = "any format" if data.format == "auto" else data.format
    for name in data.columns or {}:
        if name not in known:
            raise InputError(
                f"{name!r} is not a field of {owner}",
                where="data.columns",
                hint=nearest_word(name, sorted(known)) or f"fields: {', '.join(sorted(known))}",
            )


def _share(read: list[Rows], share: float, data: Data) -> tuple[Rows, list[Rows]]:
    """Return the held-out rows and the rest of each source.

    share: of all rows; with `data.max_rows`, of so many training rows and the held-out ones.
    """
    all_rows = Rows.joined(read)
    number = len(all_rows)
    if number == 1 and (parts_of_text := _cut_text(all_rows, share)) is not None:
        rest, held_out = parts_of_text
        return held_out, [rest if len(rows) else rows for rows in read]
    if number < 2:
        raise DataError(
            "data.eval as a share needs at least two rows",
            [Problem(all_rows[0].origin, "it is the only row")],
            hint="name a file of held-out rows, or add more text",
        )
    used = number if data.max_rows is None else min(number, data.max_rows / (1 - share))
    size = min(max(round(share * used), 1), number - 1)
    is_held_out = np.zeros(number, bool)
    is_held_out[_chosen(number, size, f"{data.seed}/eval")] = True
    bounds = np.cumsum([len(rows) for rows in read])[:-1]
    parts = zip(read, np.split(is_held_out, bounds), strict=True)
    return all_rows.take(is_held_out), [rows.take(~held_out) for rows, held_out in parts]


def _cut_text(rows: Rows, share: float) -> tuple[Rows, Rows] | None:
    """Return (training part, held-out part) of a single long text; None if there is no such row.

    The end of the text is held out, from the beginning of a line or at least of a word.
    """
    row = rows[0]
    if format_of(row.fields) != "text" or not isinstance(row.fields["text"], str):
        return None
    text = row.fields["text"]
    if len(text) < _MIN_CUT_CHARACTERS:
        return None
    most = round(len(text) * (1 - share))
    places = [text.rfind(separator, 0, most) + 1 for separator in ("\n", " ")]
    store, first = rows.store, len(rows.store)
    name, _, line = row.origin.rpartition(":")
    for place in (*places, most):
        parts = text[:place], text[place:]
        if all(part.strip() for part in parts):
            for part in parts:
                store.add(name, int(line), {**row.fields, "text": part}, "text")
            return Rows(store, np.array([first])), Rows(store, np.array([first + 1]))
    return None


def _weighted(rows: Rows, source: Source, seed: str) -> Rows:
    """Return the rows repeated by the integer part of the weight, and a sample for the rest."""
    times, fraction = divmod(source.weight, 1)
    sample = rows.take(_chosen(len(rows), round(fraction * len(rows)), seed))
    result = Rows.joined([*[rows] * int(times), sample])
    if len(rows) and not len(result):
        raise InputError(
            f"weight {source.weight:g} leaves no row of {source.path}, which has "
            f"{format_rows(len(rows))}",
            where="data.train",
        )
    return result


def _limited(weighted: list[Rows], data: Data) -> list[Rows]:
    """Return at most `data.max_rows` rows of all sources together."""
    number = sum(map(len, weighted))
    if data.max_rows is None or number <= data.max_rows:
        return weighted
    chosen = _chosen(number, data.max_rows, f"{data.seed}/max_rows")
    first = np.cumsum([0, *(len(rows) for rows in weighted)])
    places = np.split(chosen, np.searchsorted(chosen, first[1:-1]))
    return [
        rows.take(part - start) for rows, part, start in zip(weighted, places, first, strict=False)
    ]


def _chosen(number: int, size: int, seed: str) -> NDArray[np.int64]:
    """Return `size` of the numbers below `number`, in ascending order."""
    return np.array(sorted(random.Random(seed).sample(range(number), size)), np.int64)
