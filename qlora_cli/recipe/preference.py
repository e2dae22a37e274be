"""The recipe's section `preference`: the loss of `task: preference`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_cli.recipe.section import NoEffect, Section

PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo"]


class Preference(Section):
    """The loss of `task: preference`, which compares the two answers of each pair."""

    loss: PreferenceLoss = "dpo"
    """dpo (Rafailov 2023) and ipo (Azar 2023) compare with a reference model; simpo (Meng 2024) and
    orpo (Hong 2024) need none and use log-probabilities per token; all four add up over pairs."""
    beta: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Strength of the preference: for dpo and ipo a larger value keeps the model closer to the
    reference; simpo multiplies log-probabilities per token by it, and orpo its preference term;
    auto selects 2.0 for simpo and 0.1 for the others."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of pairs whose answers are swapped by mistake; applies to loss: dpo."""
    gamma: Annotated[float, Field(ge=0.0)] = 1.0
    """Reward margin that the chosen answer should have; applies to loss: simpo."""
    reference: Literal["base", "start"] = "base"
    """Reference model of dpo and ipo: base is the base without an adapter, start is the adapter
    that `adapter.from` names; its log-probabilities are computed before the first step and stored
    in the run."""

    @model_validator(mode="after")
    def _settings_match_loss(self) -> Preference:
        users = {"label_smoothing": ("dpo",), "gamma": ("simpo",), "reference": ("dpo", "ipo")}
        for name, losses in users.items():
            if name in self.model_fields_set and self.loss not in losses:
                names = " and ".join(losses)
                what = f"{name} applies to loss: {names} only, and loss is {self.loss}"
                raise NoEffect(what, {f"preference.{name}": "preference.loss"})
        return self

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares with a reference model."""
        return self.loss in ("dpo", "ipo")

    def check_with(self, task: str, format: str, long_rows: str, initial: str | None) -> None:
        """Raise ValueError if the section does not apply to the recipe's other settings.

        task, format, long_rows: settings of the recipe. initial: `adapter.from`.
        """
        written = self.model_fields_set
        if task != "preference":
            if written:
                keys = [f"preference.{name}" for name in sorted(written)]
                raise NoEffect(
                    f"{', '.join(keys)}: needs task: preference, and task is {task}",
                    dict.fromkeys(keys, "task"),
                )
            return
        if format != "preference":
            raise ValueError(
                "task: preference needs rows with a chosen and a rejected answer; remove "
                f"data.format, which is {format}"
            )
        if long_rows in ("truncate", "split"):
            raise ValueError(
                f"data.long_rows: {long_rows} would change the answers of a pair; use drop or "
                "error with task: preference"
            )
        if self.reference == "start" and initial is None:
            raise ValueError(
                "preference.reference: start needs adapter.from; without it training starts with "
                "the base, so base is the same"
            )
