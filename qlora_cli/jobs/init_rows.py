"""Choose a new recipe's settings of the section `data` from the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qlora_cli.data.formats import format_of, likely_columns
from qlora_cli.data.load import ModelLimits
from qlora_cli.data.long_rows import policy_of
from qlora_cli.data.mixture import sources_of
from qlora_cli.data.packing import pack
from qlora_cli.data.positions import num_positions
from qlora_cli.data.rows import read_rows
from qlora_cli.data.template import with_template
from qlora_cli.errors import ModelError
from qlora_cli.jobs.data_survey import Survey, survey
from qlora_cli.jobs.labels import resolve_labels, text_columns
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import MAX_SEQ_LEN, Data, LongRows, Sources
from qlora_cli.recipe.write import recipe_of
from qlora_cli.units import format_count, format_rows

HeldOut = Literal["auto"] | Sources | float | None
"""What `data.eval` is: chosen, files, a share, or no held-out rows."""
_TEMPLATE = "chatml"
"""Chat template of a base that has none."""
_UNIT = 64
"""Sequence lengths are multiples of this."""
_SHARE_OF_ROWS = 0.99
"""Share of the rows that a sequence holds at least, if some rows are very long."""
_MAX_STRETCH = 2
"""All rows are held if the longest is at most this much longer than 99 % of the rows."""
_MIN_SHARED = 5
"""With fewer rows, none are held out."""
_SHARES = ((50, 0.2), (None, 0.1))
"""(number of rows below which it applies, share that is held out)."""
_SHARE_OF_TEXT, _MIN_TEXT_TOKENS = 0.05, 2000
"""Share that is held out of a single text with at least this many tokens."""
_MAX_HELD_OUT = 200
"""Number of rows that a chosen share holds out at most, about."""
_NO_TEMPLATE = (
    "the rows are chats and the base's tokenizer has no chat template; chatml is a common one"
)


@dataclass(frozen=True)
class FoundRows:
    """The rows of a data setting with their complete lengths, and the settings chosen for them.

    survey: without a limit of the length. choices: of the section `data`, without `seq_len`.
    """

    survey: Survey
    choices: tuple[Choice, ...]
    positions: int | None

    @property
    def held_out_share(self) -> float:
        """Return the share of the rows that is not trained on."""
        values = {choice.key: choice.value for choice in self.choices}
        share = values.get("data.eval")
        return share if isinstance(share, float) else 0.0

    @property
    def train_rows(self) -> int:
        """Return the number of rows that are trained on."""
        return self.survey.rows - round(self.survey.rows * self.held_out_share)

    def seq_len(self) -> Choice:
        """Return a sequence length that holds the rows, at most the base's positions."""
        lengths = sorted(self.survey.lengths)
        longest, most = lengths[-1], lengths[math.ceil(_SHARE_OF_ROWS * len(lengths)) - 1]
        default = Data.model_fields["seq_len"].default
        if self.is_split and longest > default:
            wanted = default
        else:
            wanted = longest if longest <= _MAX_STRETCH * most else most
        rounded = math.ceil(wanted / _UNIT) * _UNIT
        chosen = rounded if self.positions is None else min(rounded, self.positions)
        return Choice("data.seq_len", chosen, self.seq_len_reason(chosen, wanted))

    def seq_len_reason(self, seq_len: int, wanted: int) -> str:
        """Return how many rows a sequence holds, and what limits its length."""
        lengths = self.survey.lengths
        held = sum(length <= seq_len for length in lengths)
        longest = f"the longest has {format_count(max(lengths))} tokens"
        rows = format_rows(len(lengths))
        if self.survey.is_sample:
            rows += f", a random sample of {format_count(self.survey.rows)}"
        if self.is_split and held < len(lengths):
            parts = [f"longer texts are split into pieces (data.long_rows); {longest}"]
        else:
            done = "truncated" if self._policy == "truncate" else "left out"
            parts = [f"holds {format_count(held)} of {rows}; {longest}"]
            parts += [f"longer rows are {done} (data.long_rows)"] if held < len(lengths) else []
        if self.positions is not None and seq_len < wanted:
            parts.append(f"the base has {format_count(self.positions)} positions")
        return "; ".join(parts)

    def sequences(self, seq_len: int) -> int:
        """Return the number of sequences per epoch, by proportion if the rows are a sample."""
        limit = seq_len if self.positions is None else min(seq_len, self.positions)
        fitted = len(pack(list(self._fitted(limit)), seq_len))
        share = 1 - self.held_out_share
        return max(1, round(self.survey.of_all(fitted) * share))

    def _fitted(self, limit: int) -> Iterable[int]:
        """Yield the length of each row or piece of a row that a sequence of `limit` tokens has."""
        for length in self.survey.lengths:
            if length <= limit:
                yield length
            elif self.is_split:
                pieces = math.ceil(length / limit)
                yield from [math.ceil(length / pieces)] * pieces
            elif self._policy == "truncate":
                yield limit

    @property
    def is_split(self) -> bool:
        """Return whether rows that are too long are split into several sequences."""
        return self._policy == "split"

    @property
    def _policy(self) -> LongRows:
        return policy_of("auto", self.survey.format)


def find_rows(
    model: str, train: Sources, held_out: HeldOut, tokenizer: Any, config: Any
) -> FoundRows:
    """Return the rows of `train` with the settings chosen for them.

    model: of the recipe. held_out: what `data.eval` is. tokenizer: the base's; it is changed if it
    gets a chat template. config: transformers' config of the base. Raises the errors of
    `RowLoader`.
    """
    columns, task = _columns(train)
    given = [Choice("model.name", model, ""), Choice("data.train", train, "")]
    given += [Choice("data.seq_len", MAX_SEQ_LEN, ""), *columns, *task]
    vocabulary = ModelLimits(ModelLimits.of(config).vocab_size)
    template: list[Choice] = []
    try:
        found = survey(resolve_labels(recipe_of(given), config)[0], tokenizer, vocabulary)
    except ModelError:
        if tokenizer is None or tokenizer.chat_template:
            raise
        template = [Choice("data.template", _TEMPLATE, _NO_TEMPLATE)]
        recipe = recipe_of([*given, *template])
        found = survey(recipe, with_template(tokenizer, recipe.data), vocabulary)
    noun = "row" if found.rows == 1 else "rows"
    reason = f"{format_count(found.rows)} {noun} in the format `{found.format}`"
    choices = [Choice("data.train", train, reason), *columns, *template, *task]
    choices += _held_out(held_out, found)
    return FoundRows(found, tuple(choices), num_positions(config))


def _columns(train: Sources) -> tuple[list[Choice], list[Choice]]:
    """Return the choices of `data.columns` and of `task` by the fields of the first row.

    The first is for rows whose fields have other tools' names, the second for preference pairs and
    labelled texts.
    """
    row = read_rows(sources_of(train)[0].path, limit=1)[0]
    fields = row.fields
    found = format_of(fields)
    texts = text_columns(row)
    if "label" in fields and (texts is not None or "text" in fields):
        return [], [Choice("task", "classification", "the rows are texts with a label")]
    if found == "preference":
        reason = "the rows are pairs of a chosen and a rejected answer"
        return [], [Choice("task", "preference", reason)]
    known = likely_columns(fields) if found is None else None
    if known is None:
        return [], []
    columns, name = known
    reason = f"reads the columns as the fields of `{name}` rows"
    return [Choice("data.columns", columns, reason)], []


def _held_out(setting: HeldOut, found: Survey) -> list[Choice]:
    """Return the choice of `data.eval`; none if there are no held-out rows."""
    rows = found.rows
    if setting is None:
        return []
    if setting != "auto":
        reason = "this share of the rows is" if isinstance(setting, float) else "these rows are"
        return [Choice("data.eval", setting, f"{reason} not trained on and shows what is learned")]
    if rows == 1 and found.format == "text" and sum(found.lengths) >= _MIN_TEXT_TOKENS:
        reason = "the end of the text is held out: its loss shows what is learned"
        return [Choice("data.eval", _SHARE_OF_TEXT, reason)]
    if rows < _MIN_SHARED:
        few = f"{format_count(rows)} row{' is' if rows == 1 else 's are'} too few to hold some out"
        return [Choice("data.eval", None, f"{few}; name a file of held-out rows here")]
    share = next(share for most, share in _SHARES if most is None or rows < most)
    share = share if rows * share <= _MAX_HELD_OUT else float(f"{_MAX_HELD_OUT / rows:.1g}")
    number = format_count(round(share * rows))
    reason = f"{number} of {format_count(rows)} rows are held out: their loss shows what is learned"
    return [Choice("data.eval", share, reason)]
