"""Base of the user-facing configuration classes: frozen, strict, errors that name every wrong field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from venturi.core.errors import RequestError
from venturi.core.registry import nearest


class Settings(BaseModel):
    """A frozen record. Unknown fields and bad values raise RequestError with all problems at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as exc:
            raise RequestError(_describe(type(self), exc)) from exc


def _describe(kind: type[BaseModel], exc: ValidationError) -> str:
    lines = []
    for error in exc.errors(include_url=False):
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            hint = nearest(name, kind.model_fields) or f" Fields: {', '.join(kind.model_fields)}."
            lines.append(f"unknown field {name!r}.{hint}")
        elif error["type"] == "value_error":
            lines.append(str(error["ctx"]["error"]) if "ctx" in error else error["msg"])
        else:
            lines.append(f"{name}={error['input']!r}: {error['msg'].lower()}")
    return f"{kind.__name__}: " + "; ".join(lines)
