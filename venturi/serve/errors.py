"""What a request can fail with: the protocol's codes, as HTTP and gRPC statuses."""

from __future__ import annotations

from enum import Enum

from venturi.core.errors import VenturiError


class Status(Enum):
    """(HTTP status, gRPC status name) of each code."""

    UNKNOWN = (400, "UNKNOWN")
    INTERNAL = (500, "INTERNAL")
    NOT_FOUND = (404, "NOT_FOUND")
    INVALID_ARG = (400, "INVALID_ARGUMENT")
    UNAVAILABLE = (503, "UNAVAILABLE")
    UNSUPPORTED = (501, "UNIMPLEMENTED")
    ALREADY_EXISTS = (400, "ALREADY_EXISTS")
    CANCELLED = (400, "CANCELLED")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED")
    RESTRICTED = (403, "UNAVAILABLE")
    LIMITED = (429, "RESOURCE_EXHAUSTED")

    @property
    def http(self) -> int:
        return self.value[0]

    @property
    def grpc(self) -> str:
        return self.value[1]


class ServeError(VenturiError):
    """A refused or failed request. `message` is what the client reads."""

    code = "SERVE"

    def __init__(self, status: Status, message: str, *, where: str = "") -> None:
        super().__init__(message, where=where)
        self.status = status


def invalid(message: str) -> ServeError:
    return ServeError(Status.INVALID_ARG, message)


def not_found(message: str) -> ServeError:
    return ServeError(Status.NOT_FOUND, message)


def unavailable(message: str) -> ServeError:
    return ServeError(Status.UNAVAILABLE, message)


def unsupported(message: str) -> ServeError:
    return ServeError(Status.UNSUPPORTED, message)


def as_serve_error(exc: BaseException) -> ServeError:
    """What a model raised, as the client sees it: our own errors keep their words, others become INTERNAL."""
    if isinstance(exc, ServeError):
        return exc
    if isinstance(exc, VenturiError):
        status = Status.INVALID_ARG if exc.code == "SHAPE" else Status.INTERNAL
        return ServeError(status, str(exc))
    return ServeError(Status.INTERNAL, f"{type(exc).__name__}: {exc}")
