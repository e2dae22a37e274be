"""The base class of every section of a recipe."""

from __future__ import annotations

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
