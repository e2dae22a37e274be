"""The base class of every section of a recipe, and the error of a setting without effect."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A section of the recipe. Unknown keys are errors, and values are not converted between types.

    `use_attribute_docstrings` makes the string under a field its description.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )

    @classmethod
    def fields_by_key(cls) -> dict[str, FieldInfo]:
        """Return key in a recipe -> field. The keys of fields with an alias are their aliases."""
        return {info.alias or name: info for name, info in cls.model_fields.items()}


class NoEffect(ValueError):
    """Settings that the recipe sets, and that have no effect with the value of another setting.

    what: the message for the user. causes: dotted key of each setting without effect -> dotted key
    of the other setting. `load.py` drops the settings if an override has set the other one.
    """

    def __init__(self, what: str, causes: Mapping[str, str]) -> None:
        super().__init__(what)
        self.causes = dict(causes)
