"""The recipe's section `classification`: labels, loss and metrics of `task: classification`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_cli.recipe.section import Section

LabelKind = Literal["classes", "regression"]
Weight = Annotated[float, Field(gt=0)]

CLASS_METRICS = ("accuracy", "f1", "matthews")
"""Metrics of classes."""
REGRESSION_METRICS = ("pearson", "spearman")
"""Metrics of a regression."""
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
"""A metric that can choose the best step."""


class Classification(Section):
    """The labels of `task: classification`, and the weights of its loss."""

    kind: Literal["auto"] | LabelKind = "auto"
    """classes predicts one label of several; regression predicts a number, with the mean squared
    error as loss; auto selects regression if a label is a number with a fraction."""
    labels: Literal["auto"] | list[str] = "auto"
    """Names of the classes, in the order of their numbers; auto takes the names that the base's
    config.json has for these labels, else the labels of the training rows in order."""
    pairs: Literal["auto"] | bool = "auto"
    """Whether each row has two texts, `text` and `text_pair`; auto takes what most training rows
    have."""
    class_weights: Literal["balanced"] | dict[str, Weight] | None = None
    """Factor of the loss of each label's rows: a number for each label, or balanced for rows /
    (labels x rows of the label); null gives every row the same weight."""

    @model_validator(mode="after")
    def _labels_are_several(self) -> Classification:
        labels = self.labels
        if labels == "auto":
            return self
        if self.kind == "regression":
            raise ValueError("labels applies to kind: classes only, and kind is regression")
        if len(set(labels)) < len(labels):
            raise ValueError("labels names a label twice")
        if len(labels) < 2:
            raise ValueError(f"labels has {len(labels)} names; at least two are needed")
        return self

    @model_validator(mode="after")
    def _weights_are_of_labels(self) -> Classification:
        if self.class_weights is None:
            return self
        if self.kind == "regression":
            raise ValueError("class_weights applies to kind: classes only, and kind is regression")
        if isinstance(self.class_weights, dict) and self.labels != "auto":
            different = set(self.class_weights) ^ set(self.labels)
            if different:
                raise ValueError(
                    f"class_weights needs a number for each label and no other; check "
                    f"{', '.join(sorted(different))}"
                )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the classes; none if they are not known or it is a regression."""
        return () if self.labels == "auto" else tuple(self.labels)

    @property
    def is_regression(self) -> bool:
        """Return whether a number is predicted."""
        return self.kind == "regression"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the metrics that an evaluation computes."""
        return REGRESSION_METRICS if self.is_regression else CLASS_METRICS

    def check_with(self, task: str, format: str, long_rows: str, metric: str | None) -> None:
        """Raise ValueError if the section does not apply to the recipe's other settings.

        task, format, long_rows: settings of the recipe. metric: that `train.keep_best` names.
        """
        written = self.model_fields_set
        if task != "classification":
            if metric is not None:
                raise ValueError(f"train.keep_best: {metric} needs task: classification")
            if written:
                raise ValueError(
                    f"classification.{', classification.'.join(sorted(written))}: needs task: "
                    f"classification, and task is {task}"
                )
            return
        if format != "classification":
            raise ValueError(
                "task: classification needs rows with a text and a label; remove data.format, "
                f"which is {format}"
            )
        if long_rows == "split":
            raise ValueError(
                "data.long_rows: split would give each piece the label of the whole row; use "
                "truncate, drop or error with task: classification"
            )
        if metric is not None and self.kind != "auto" and metric not in self.metrics:
            raise ValueError(
                f"train.keep_best: {metric} is no metric of classification.kind: {self.kind}; use "
                f"{', '.join(self.metrics)}"
            )
