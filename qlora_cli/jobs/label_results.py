"""The results of `qlora generate` and `qlora eval` for a sequence classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class LabelResult(Result):
    """The prediction for a text.

    second: the second text of a pair; None for one text. text: the most likely label, or the
    predicted number as text. probabilities: label -> its probability, the most likely first; empty
    for a number. value: the number; None for a label.
    """

    prompt: str
    text: str
    second: str | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; keys that do not apply are left out."""
        content: dict[str, Any] = {"prompt": self.prompt}
        if self.second is not None:
            content["text_pair"] = self.second
        content["text"] = self.text
        if self.value is not None:
            return content | {"value": self.value}
        return content | {"label": self.text, "probabilities": self.probabilities}


@dataclass(frozen=True)
class LabelEvalResult(Result):
    """The evaluation of labelled rows.

    loss: mean over the rows, the recipe's. rows: their number. metrics: accuracy, f1 and matthews,
    or pearson and spearman.
    """

    loss: float
    rows: int
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, with the metrics next to the loss."""
        return {"loss": self.loss, "rows": self.rows, **self.metrics}
