"""The seam between the driver and the rules. A policy holds waiting requests; it never looks at a clock or a thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from venturi.serve.request import InferRequest


@dataclass(frozen=True)
class Run:
    """Execute these together, now."""

    requests: list[InferRequest]


@dataclass(frozen=True)
class Wait:
    """Nothing to run before `until_ns`, unless requests arrive; None: only an arrival changes anything."""

    until_ns: int | None = None


class Policy(Protocol):
    """All times are nanoseconds of one monotonic clock, given by the caller.

    expired_message: what expired requests are told. by_instance: `take` depends on the instance. starts_at_once: a
    request that finds nobody waiting and an instance free would be taken now, alone, so it need not be added.
    """

    expired_message: str
    by_instance: bool
    starts_at_once: bool

    def add(self, request: InferRequest, now_ns: int) -> None:
        """Raises ServeError UNAVAILABLE when the queue is full."""

    def expire(self, now_ns: int) -> list[InferRequest]:
        """Take out what waited too long."""

    def cancel(self, request: InferRequest) -> list[InferRequest]:
        """Take the request out, and those that make no sense without it; returns them, none when it is not waiting."""

    def take(self, now_ns: int, instance: int) -> Run | Wait:
        """Called when the instance is free."""

    def again(self, request: InferRequest, now_ns: int) -> bool:
        """Put a request of the batch that `done` will hear of in line once more; False where that is not done."""

    def done(self, requests: list[InferRequest], now_ns: int) -> None:
        """A batch came back from its instance."""

    def next_deadline(self) -> int | None:
        """When `expire` should be called next."""

    def __len__(self) -> int:
        """Requests waiting."""
