"""Choose what `task: classification` leaves open: columns, labels, weights, padding.

The choices depend on the rows and on the base. They are made once, printed, and stored in the
recipe of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from qlora_cli.data.encode_labels import LabelEncoder
from qlora_cli.data.mixture import DataRows, read_data
from qlora_cli.data.row_errors import FieldsError
from qlora_cli.data.row_store import Row
from qlora_cli.errors import InputError, Problem, RecipeError
from qlora_cli.jobs.padding import is_padded
from qlora_cli.recipe.classification import Classification
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Data, Recipe
from qlora_cli.units import format_count

_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence", None),
)
"""Columns of GLUE and similar data with the first and the second text of a row."""
_NUM_SHOWN = 6
_DEFAULT_NAME = "LABEL_"


@dataclass
class _Found:
    """What the training rows have. labels: text of a label -> rows. pairs: rows of two texts."""

    rows: int = 0
    pairs: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def resolve_labels(
    recipe: Recipe, config: Any, *, needs_rows: bool = True
) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return the recipe without open settings of `task: classification`, and the choices.

    Other recipes are returned as they are. config: transformers' config of the base. needs_rows:
    whether missing rows are an error; without rows the labels of the config are taken.
    Raises RecipeError if the rows have fewer than two labels or the settings contradict them, and
    the errors of reading rows.
    """
    if recipe.task != "classification":
        return recipe, ()
    choices: list[Choice] = []
    try:
        rows = read_data(recipe.data)
    except InputError:
        if needs_rows:
            raise
        rows = None
    recipe = _with_columns(recipe, rows, choices)
    found = _Found() if rows is None else _survey(rows, recipe.data)
    settings = _settings(recipe, found, config, choices)
    recipe = recipe.model_copy(update={"classification": settings})
    recipe = _with_weights(recipe, rows, choices)
    _check_metric(recipe)
    return _with_padding(recipe, config, choices), tuple(choices)


def text_columns(row: Row) -> dict[str, str] | None:
    """Return `data.columns` for a row with the column names of GLUE; None for another row."""
    if "text" in row.fields:
        return None
    for first, second in _COLUMNS:
        if first in row.fields and (second is None or second in row.fields):
            return {"text": first} | ({} if second is None else {"text_pair": second})
    return None


def _with_columns(recipe: Recipe, rows: DataRows | None, choices: list[Choice]) -> Recipe:
    if recipe.data.columns is not None or rows is None:
        return recipe
    columns = text_columns(rows.train[0])
    if columns is None:
        return recipe
    choices.append(Choice("data.columns", columns, "the rows have these columns and no 'text'"))
    data = recipe.data.model_copy(update={"columns": columns})
    return recipe.model_copy(update={"data": data})


def _survey(rows: DataRows, data: Data) -> _Found:
    """Count the labels of the training rows, and of held-out rows that are a share of them."""
    parts = [rows.train]
    if isinstance(data.eval, float) and rows.held_out is not None:
        parts.append(rows.held_out)
    second = (data.columns or {}).get("text_pair", "text_pair")
    label_column = (data.columns or {}).get("label", "label")
    found = _Found()
    for row in (row for part in parts for row in part):
        fields = row.fields
        label = fields.get("label", fields.get(label_column))
        found.rows += 1
        found.pairs += fields.get("text_pair", fields.get(second)) is not None
        if isinstance(label, str | int | float) and not isinstance(label, bool):
            found.labels[_text_of(label)] += 1
    return found


def _text_of(label: str | int | float) -> str:
    """Return a label as the encoder compares it."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _settings(recipe: Recipe, found: _Found, config: Any, choices: list[Choice]) -> Classification:
    """Return the section with kind, labels and pairs. Raises RecipeError."""
    settings = recipe.classification
    changes: dict[str, Any] = {}
    if settings.pairs == "auto":
        changes["pairs"] = 2 * found.pairs > found.rows
        if changes["pairs"]:
            reason = (
                f"{format_count(found.pairs)} of {format_count(found.rows)} rows have two texts"
            )
            choices.append(Choice("classification.pairs", True, reason))
    kind = settings.kind
    if kind == "auto":
        kind, reason = _kind(settings, found)
        changes["kind"] = kind
        choices.append(Choice("classification.kind", kind, reason))
    if kind == "classes" and settings.labels == "auto":
        names, reason = _names(found, config)
        changes["labels"] = names
        choices.append(Choice("classification.labels", names, reason))
    elif kind == "regression" and settings.class_weights is not None:
        raise _refused(
            "classification.class_weights", "applies to classes, and the labels are numbers"
        )
    return settings.model_copy(update=changes)


def _kind(settings: Classification, found: _Found) -> tuple[Literal["classes", "regression"], str]:
    if settings.labels != "auto":
        return "classes", "classification.labels names the classes"
    fractions = [
        label for label in found.labels if _is_number(label) and not label.lstrip("+-").isdigit()
    ]
    if fractions and all(map(_is_number, found.labels)):
        return "regression", f"labels are numbers with a fraction, such as {fractions[0]}"
    return "classes", "the labels are names or whole numbers"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(found: _Found, config: Any) -> tuple[list[str], str]:
    """Return the names of the classes and the reason. Raises RecipeError for fewer than two."""
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    labels = found.labels
    if not labels:
        if found.rows:
            raise _refused("data.train", "no row has a 'label'")
        return own, "there are no rows here; the base's config.json has this number of labels"
    are_numbers = all(label.isdigit() and int(label) < len(own) for label in labels)
    is_named = not any(name.startswith(_DEFAULT_NAME) for name in own)
    if len(own) > 1 and is_named and (set(labels) <= set(own) or are_numbers):
        return own, "the base's config.json names them"
    if len(labels) < 2:
        only = next(iter(labels))
        raise _refused(
            "classification.labels",
            f"all {format_count(found.rows)} rows have the label {only!r}; at least two labels are "
            "needed",
        )
    are_digits = all(label.lstrip("-").isdigit() for label in labels)
    names = sorted(labels, key=int) if are_digits else sorted(labels)
    counts = ", ".join(f"{name} {format_count(labels[name])}" for name in islice(names, _NUM_SHOWN))
    more = ", ..." if len(names) > _NUM_SHOWN else ""
    return names, f"the labels of the rows ({counts}{more})"


def _with_weights(recipe: Recipe, rows: DataRows | None, choices: list[Choice]) -> Recipe:
    """Replace `class_weights: balanced` by numbers. Raises RecipeError for other labels."""
    settings = recipe.classification
    if isinstance(settings.class_weights, dict):
        different = sorted(set(settings.class_weights) ^ set(settings.names))
        if different:
            raise _refused(
                "classification.class_weights",
                f"needs a number for each label and no other; check {', '.join(different)}",
            )
    if settings.class_weights != "balanced":
        return recipe
    counts = Counter(_classes(settings.names, rows, recipe.data) if rows is not None else ())
    total = sum(counts.values())
    weights = {
        name: total / (len(settings.names) * counts[name]) if counts[name] else 1.0
        for name in settings.names
    }
    reason = "balanced: rows / (labels x rows of the label)"
    choices.append(Choice("classification.class_weights", weights, reason))
    changed = settings.model_copy(update={"class_weights": weights})
    return recipe.model_copy(update={"classification": changed})


def _classes(names: Sequence[str], rows: DataRows, data: Data) -> Iterator[str]:
    """Yield the name of the class of each training row whose label is one."""
    encoder = LabelEncoder(tuple(names))
    column = (data.columns or {}).get("label", "label")
    for row in rows.train:
        label = row.fields.get("label", row.fields.get(column))
        try:
            if isinstance(label, str | int | float):
                yield names[int(encoder.value(label))]
        except FieldsError:
            continue  # Encoding the rows reports it.


def _check_metric(recipe: Recipe) -> None:
    metric, settings = recipe.best_metric, recipe.classification
    if metric is not None and metric not in settings.metrics:
        raise _refused(
            "train.keep_best",
            f"{metric} is no metric of {settings.kind}; use {', '.join(settings.metrics)}",
        )


def _with_padding(recipe: Recipe, config: Any, choices: list[Choice]) -> Recipe:
    """Disable packing for a model whose attention cannot separate rows. Raises RecipeError."""
    if not recipe.data.packing or not is_padded(recipe, config):
        return recipe
    reason = (
        f"the attention of {config.model_type} cannot separate rows that share a sequence, so rows "
        "are padded to the longest of their micro-batch"
    )
    if "packing" in recipe.data.model_fields_set:
        raise _refused("data.packing", reason)
    choices.append(Choice("data.packing", False, reason))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


def _refused(key: str, what: str) -> RecipeError:
    return RecipeError("the recipe does not fit its rows or its base", [Problem(key, what)])
