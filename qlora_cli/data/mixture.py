"""Choose the rows that are trained and held out: sources, weights, shares and limits.

The order is: read all rows, take the share of `data.eval` away, repeat or sample each source by its
weight, limit the number of rows by `data.max_rows`. All random choices depend only on `data.seed`
and the number of rows, so every command chooses the same rows. Chosen rows keep their order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.data.formats import FORMATS
from qlora_cli.data.rows import Row, read_places
from qlora_cli.errors import DataError, InputError, Problem
from qlora_cli.recipe.schema import Data, Source, Sources
from qlora_cli.recipe.suggest import nearest_word
from qlora_cli.units import format_count


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

    held_out: empty if `data.eval` is null. sources: of the training rows.
    """

    train: list[Row]
    held_out: list[Row]
    sources: tuple[SourceCount, ...]

    def notes(self, data: Data) -> list[str]:
        """Return one line per choice of rows that the settings made."""
        notes = []
        if len(self.sources) > 1 or any(source.weight != 1 for source in self.sources):
            counts = ", ".join(
                f"{format_count(source.used)} from {source.path}"
                + (f" (weight {source.weight:g})" if source.weight != 1 else "")
                for source in self.sources
            )
            notes.append(f"training rows: {counts}")
        if isinstance(data.eval, float):
            number = format_count(len(self.held_out))
            notes.append(
                f"data.eval={data.eval:g}: {number} rows are held out and not trained on "
                f"(data.seed={data.seed})"
            )
        if data.max_rows is not None:
            notes.append(
                f"data.max_rows={data.max_rows}: {format_count(len(self.train))} training rows are "
                f"used (data.seed={data.seed})"
            )
        return notes


def read_data(data: Data) -> DataRows:
    """Return the rows that a recipe's data section chooses.

    Raises InputError if a file or dataset cannot be read or a setting cannot be applied, DataError
    listing every broken row.
    """
    _check_columns(data)
    sources = sources_of(data.train)
    read = _read(sources, data, "data.train")
    held_out: list[Row] = []
    rest = read
    if isinstance(data.eval, float):
        held_out, rest = _share(read, data.eval, data.seed)
    elif data.eval is not None:
        held_out = read_held_out(data)
    weighted = [
        _weighted(rows, source, f"{data.seed}/{number}")
        for number, (rows, source) in enumerate(zip(rest, sources, strict=True))
    ]
    train = _limited(weighted, data)
    counts = tuple(
        SourceCount(source.path, source.weight, len(rows), len(used))
        for source, rows, used in zip(sources, read, train, strict=True)
    )
    return DataRows([row for rows in train for row in rows], held_out, counts)


def read_held_out(data: Data) -> list[Row]:
    """Return the held-out rows of a recipe; empty if `data.eval` is null. Errors as `read_data`."""
    if data.eval is None:
        return []
    if isinstance(data.eval, float):
        return read_data(data).held_out
    sources = sources_of(data.eval)
    if any(source.weight != 1 for source in sources):
        raise InputError("weights apply to data.train only", where="data.eval")
    return [row for rows in _read(sources, data, "data.eval") for row in rows]


def sources_of(setting: Sources) -> list[Source]:
    """Return the sources that `data.train` or `data.eval` names."""
    items = [setting] if isinstance(setting, str) else setting
    return [Source(path=item) if isinstance(item, str) else item for item in items]


def sources_text(setting: Sources | float | None) -> str:
    """Return `data.train` or `data.eval` as text for people."""
    if setting is None or isinstance(setting, float):
        return "none" if setting is None else f"{setting:.3g} of the training rows"
    return ", ".join(source.path for source in sources_of(setting))


def _read(sources: Sequence[Source], data: Data, key: str) -> list[list[Row]]:
    try:
        return read_places([source.path for source in sources], columns=data.columns)
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


def _share(read: list[list[Row]], share: float, seed: int) -> tuple[list[Row], list[list[Row]]]:
    """Return the held-out rows and the rest of each source."""
    number = sum(map(len, read))
    if number < 2:
        raise DataError(
            "data.eval as a share needs at least two rows",
            [Problem(read[0][0].origin, "it is the only row")],
            hint="name a file of held-out rows, or divide the text into several files",
        )
    size = min(max(round(share * number), 1), number - 1)
    chosen = set(random.Random(f"{seed}/eval").sample(range(number), size))
    held_out: list[Row] = []
    rest: list[list[Row]] = []
    first = 0
    for rows in read:
        held_out += [row for index, row in enumerate(rows, first) if index in chosen]
        rest.append([row for index, row in enumerate(rows, first) if index not in chosen])
        first += len(rows)
    return held_out, rest


def _weighted(rows: list[Row], source: Source, seed: str) -> list[Row]:
    """Return the rows repeated by the integer part of the weight, and a sample for the rest."""
    times, fraction = divmod(source.weight, 1)
    sample = _sample(rows, round(fraction * len(rows)), seed)
    result = rows * int(times) + sample
    if rows and not result:
        raise InputError(
            f"weight {source.weight:g} leaves no row of {source.path}, which has {len(rows)} rows",
            where="data.train",
        )
    return result


def _limited(weighted: list[list[Row]], data: Data) -> list[list[Row]]:
    """Return at most `data.max_rows` rows of all sources together."""
    number = sum(map(len, weighted))
    if data.max_rows is None or number <= data.max_rows:
        return weighted
    numbered = [(index, row) for index, rows in enumerate(weighted) for row in rows]
    chosen = random.Random(f"{data.seed}/max_rows").sample(range(number), data.max_rows)
    limited: list[list[Row]] = [[] for _ in weighted]
    for place in sorted(chosen):
        index, row = numbered[place]
        limited[index].append(row)
    return limited


def _sample(rows: list[Row], size: int, seed: str) -> list[Row]:
    chosen = random.Random(seed).sample(range(len(rows)), size)
    return [rows[index] for index in sorted(chosen)]
