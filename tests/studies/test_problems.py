"""Validation errors become sentences with the place, what was given and what would be valid."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from assay.studies.problems import spec_error


class Kind(Enum):
    NORM = "norm"
    MEAN = "mean"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    layers: list[int] = Field(default_factory=list)
    kind: Kind = Kind.NORM


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, which is above high, {self.high}")
        return self


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"inner": {"layers": [1, "x"]}}, "inner.layers[1]", "outer: inner.layers[1]: input should be a valid integer"),
        ({"inner": {"layer": []}}, "inner.layer", "no such field; did you mean 'layers'? (fields: kind, layers)"),
        ({"inner": {"kind": "means"}}, "inner.kind", "'means' is not one of 'norm' or 'mean'; did you mean 'mean'?"),
        ({"low": 2.0}, None, "outer: low is 2.0, which is above high, 1.0"),
        ({"low": "x" * 500}, "low", "…"),
    ],
)
def test_problems_are_sentences(given: dict[str, Any], field: str | None, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(given)
    error = spec_error(caught.value, Outer, where="outer")
    assert message in str(error)
    assert error.field == field
    assert "pydantic" not in str(error)
    assert len(str(error)) < 300
