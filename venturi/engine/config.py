"""What a user may say about a build. Unknown fields and impossible values are errors, with the choices named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from venturi.core.errors import ShapeError, VenturiError
from venturi.core.registry import nearest

Precision = Literal["model", "fp32", "tf32", "fp16", "bf16"]
Dims = tuple[int, ...]


class Profile:
    """The shapes an engine accepts: per input (min, opt, max), or one shape for all three.

    >>> Profile(x=((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))).opt("x")
    (4, 3, 8, 8)
    """

    def __init__(self, **shapes: Sequence[Any]) -> None:
        self.shapes: dict[str, tuple[Dims, Dims, Dims]] = {}
        for name, given in shapes.items():
            self.shapes[name] = _range(name, given)

    @classmethod
    def from_dict(cls, shapes: Mapping[str, Sequence[Any]]) -> Profile:
        """For input names that are not Python identifiers."""
        profile = cls()
        for name, given in shapes.items():
            profile.shapes[name] = _range(name, given)
        return profile

    def min(self, name: str) -> Dims:
        return self.shapes[name][0]

    def opt(self, name: str) -> Dims:
        return self.shapes[name][1]

    def max(self, name: str) -> Dims:
        return self.shapes[name][2]

    def admits(self, name: str, shape: Sequence[int]) -> bool:
        """Whether `shape` lies within [min, max]; inputs the profile does not name are free."""
        if name not in self.shapes:
            return True
        low, _, high = self.shapes[name]
        return len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high))

    def to_json(self) -> dict[str, list[list[int]]]:
        return {n: [list(d) for d in s] for n, s in self.shapes.items()}

    def __repr__(self) -> str:
        return f"Profile({self.shapes})"


def _range(name: str, given: Sequence[Any]) -> tuple[Dims, Dims, Dims]:
    try:
        if all(isinstance(d, int) for d in given):
            same = tuple(int(d) for d in given)
            found = (same, same, same)
        else:
            low, opt, high = (tuple(int(d) for d in shape) for shape in given)
            found = (low, opt, high)
    except (TypeError, ValueError) as exc:
        raise ShapeError(f"profile of {name!r}: expected a shape or (min, opt, max), got {given!r}") from exc
    low, opt, high = found
    if not len(low) == len(opt) == len(high) or not all(0 <= a <= b <= c for a, b, c in zip(low, opt, high)):
        raise ShapeError(f"profile of {name!r}: needs min <= opt <= max in every dimension, got {given!r}")
    return found


class BuildConfig(BaseModel):
    """Fields of a build. `budget` in seconds bounds tuning; `opt_level` 0 (no timing) to 5 (longest); `target` is the
    architecture ("sm_90") of a GPU that need not be here: nothing can be timed then. `deterministic`: all choices come
    from the timing cache, and the same model gives the same file, byte for byte."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    device: str = "auto"
    target: str | None = None
    precision: Precision = "model"
    profiles: tuple[Profile, ...] = ()
    budget: float | None = Field(default=None, gt=0)
    opt_level: int = Field(default=3, ge=0, le=5)
    timing_cache: str | Path | None = None
    strict: bool = False
    deterministic: bool = False
    refit: bool = False
    strip: bool = False
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise ValueError(f"unknown build option {name!r}.{nearest(name, cls.model_fields)}")
        return data

    @model_validator(mode="after")
    def _times_only_what_is_here(self) -> BuildConfig:
        if self.target is not None and self.device not in ("auto", "cuda"):
            raise ValueError(
                f"target {self.target!r} is a GPU that need not be here, device {self.device!r} is one that is: "
                "leave one of them out"
            )
        if self.target is not None and self.opt_level != 0:
            raise ValueError(
                f"target {self.target!r} is built without timing kernels: pass opt_level=0 (--no-tune), then tune the "
                "engine file on its GPU with `venturi tune`"
            )
        return self

    @classmethod
    def create(cls, base: BuildConfig | None = None, **changes: Any) -> BuildConfig:
        """`base` with `changes`; raises VenturiError (code CONFIG) for anything invalid."""
        data = {} if base is None else {k: getattr(base, k) for k in cls.model_fields}
        try:
            return cls(**(data | changes))
        except ValidationError as exc:
            first = exc.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            text = str(first["msg"]).removeprefix("Value error, ")
            raise ConfigError(f"{place + ': ' if place else ''}{text}") from exc


class ConfigError(VenturiError):
    code = "CONFIG"
