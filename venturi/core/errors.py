"""The error tree. Everything venturi raises on purpose is one of these.

VenturiError
 ├── ModelError      bad or unsupported model (lists every unsupported node)
 ├── ShapeError      wrong shape, dtype or name of a tensor
 ├── DeviceError     missing or failing device
 ├── EngineError     bad, corrupt or incompatible engine file
 ├── TuningError     no tactic works, or the build was cancelled
 ├── RequestError    bad request to a running engine
 └── InternalError   a bug in venturi
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class VenturiError(Exception):
    """Base of all errors. `code` is stable across versions; `where` names the place (node, file)."""

    code = "VENTURI"

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.message} [{self.where}]" if self.where else self.message


class ModelError(VenturiError):
    code = "MODEL"


class ShapeError(VenturiError):
    code = "SHAPE"


class DeviceError(VenturiError):
    code = "DEVICE"


class LostDeviceError(DeviceError):
    """This process cannot use the device any more, another one can: a command ends with this `status` (EX_TEMPFAIL)."""

    status = 75


class EngineError(VenturiError):
    code = "ENGINE"


class TuningError(VenturiError):
    code = "TUNING"


class RequestError(VenturiError):
    code = "REQUEST"


class InternalError(VenturiError):
    code = "INTERNAL"


@contextmanager
def at(where: str) -> Iterator[None]:
    """Attach a place to any VenturiError that passes through without one."""
    try:
        yield
    except VenturiError as exc:
        if not exc.where:
            exc.where = where
        raise


@contextmanager
def mapped(where: str, to: type[VenturiError], *foreign: type[BaseException]) -> Iterator[None]:
    """Turn foreign exceptions into `to`, once, at a boundary. Our own errors pass with `where` added."""
    caught: tuple[type[BaseException], ...] = foreign or (Exception,)
    try:
        yield
    except VenturiError as exc:
        if not exc.where:
            exc.where = where
        raise
    except caught as exc:
        text = str(exc).strip() or type(exc).__name__
        raise to(text.split("\nException raised from")[0], where=where) from exc
