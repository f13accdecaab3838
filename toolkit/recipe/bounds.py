"""What sections of a recipe are made of: frozen models that refuse unknown keys, and the bounds of common fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Fraction", "Misfit", "NonEmpty", "NonNegative", "Positive", "Section"]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Misfit(ValueError):
    """A field that does not fit what another section says.

    Args:
        field: `section` or `section.key`. why: what is wrong and what to do.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.path = tuple(field.split("."))


class Section(BaseModel):
    """A frozen part of a recipe; its docstrings become the schema's descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )
