"""Triton's rate limiter: instances of all models share named resources, and start in the order of scaled counts.

An instance that has work and waits for its resources is staged. Of the staged ones the first is that with the least
executions times priority (of equal ones that which waited longest); while its resources are taken, nobody overtakes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from venturi.serve.errors import invalid
from venturi.serve.instance import Instance, Report
from venturi.serve.models.base import LoadedModel
from venturi.serve.request import InferRequest

GLOBAL = "global"


@dataclass(frozen=True)
class Resource:
    """`device` is "global", "cpu" or the number of a GPU: a resource of that name exists once on each."""

    name: str
    device: str


@dataclass(eq=False)
class Ticket:
    """One instance's claim. `runs` counts its executions."""

    label: str
    needs: Mapping[Resource, int]
    priority: int
    runs: int = 0
    start: Callable[[], None] | None = None
    seen: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        return self.runs * max(self.priority, 1), self.seen


class RateLimiter:
    """Thread-safe. `limits` by name, or by name and device; other resources have as much as the largest claim."""

    def __init__(self, limits: Mapping[tuple[str, str | None], int] | None = None) -> None:
        self._limits = dict(limits or {})
        self._largest: dict[Resource, int] = {}
        self._taken: dict[Resource, int] = {}
        self._staged: list[Ticket] = []
        self._count = 0
        self._lock = threading.Lock()

    def ticket(self, label: str, needs: Mapping[Resource, int], priority: int) -> Ticket:
        """Raises ServeError for a claim that could never be met."""
        for resource, count in needs.items():
            limit = self._limit(resource)
            if limit is not None and count > limit:
                raise invalid(f"instance {label} needs {count} of resource '{resource.name}' on {resource.device}, "
                              f"--rate-limit-resource gives {limit}")  # fmt: skip
        with self._lock:
            for resource, count in needs.items():
                self._largest[resource] = max(self._largest.get(resource, 0), count)
        return Ticket(label, dict(needs), priority)

    def stage(self, ticket: Ticket, start: Callable[[], None]) -> None:
        """`start` is called once the resources are there, now or on the thread that gives them back."""
        with self._lock:
            self._count += 1
            ticket.start, ticket.seen = start, self._count
            self._staged.append(ticket)
        self._admit()

    def release(self, ticket: Ticket) -> None:
        """The execution is over."""
        with self._lock:
            for resource, count in ticket.needs.items():
                self._taken[resource] -= count
        self._admit()

    def _admit(self) -> None:
        while (start := self._next()) is not None:
            start()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if not self._staged:
                return None
            first = min(self._staged, key=lambda t: t.rank)
            if any(self._taken.get(r, 0) + n > self._available(r) for r, n in first.needs.items()):
                return None
            self._staged.remove(first)
            first.runs += 1
            for resource, count in first.needs.items():
                self._taken[resource] = self._taken.get(resource, 0) + count
            return first.start

    def _available(self, resource: Resource) -> int:
        limit = self._limit(resource)
        return self._largest[resource] if limit is None else limit

    def _limit(self, resource: Resource) -> int | None:
        own = self._limits.get((resource.name, resource.device))
        return self._limits.get((resource.name, None)) if own is None else own


class LimitedInstance(Instance):
    """An instance that runs when the limiter lets it, always on its own thread."""

    def __init__(self, name: str, model: LoadedModel, limiter: RateLimiter, ticket: Ticket) -> None:
        super().__init__(name, model)
        self._limiter, self._ticket = limiter, ticket

    def run(self, requests: list[InferRequest], report: Report) -> None:
        def finished(instance: Instance, done: list[InferRequest], outcome: object) -> None:
            self._limiter.release(self._ticket)
            report(instance, done, outcome)

        self._limiter.stage(self._ticket, lambda: super(LimitedInstance, self).run(requests, finished))

    def _judge(self, own_us: float, wall_us: float) -> None:
        """Never on the caller's thread, however fast: runs are admitted."""


def instances_of(groups: Iterable[Any], model: LoadedModel, limiter: RateLimiter | None) -> list[Instance]:
    """The instances that a configuration's groups ask for, `count` on each of their GPUs. Raises ServeError for claims
    beyond the limits."""
    return [
        _instance(group, f"{group.name}_{i}" if gpu is None else f"{group.name}_{i}_gpu{gpu}", gpu, model, limiter)
        for group in groups
        for gpu in (list(group.gpus) or [None])
        for i in range(group.count)
    ]


def _instance(group: Any, name: str, gpu: int | None, model: LoadedModel, limiter: RateLimiter | None) -> Instance:
    own: LoadedModel = getattr(model, "replicas", {}).get(gpu, model)
    if limiter is None:
        return Instance(name, own)
    device = "cpu" if gpu is None else str(gpu)
    needs = {
        Resource(r.name, GLOBAL if getattr(r, "global") else device): r.count for r in group.rate_limiter.resources
    }
    return LimitedInstance(name, own, limiter, limiter.ticket(name, needs, group.rate_limiter.priority))


def parse_rate_limit(mode: str, resources: Sequence[str]) -> RateLimiter | None:
    """--rate-limit off|execution_count and --rate-limit-resource NAME:COUNT[:DEVICE]. Raises ServeError."""
    if mode not in ("off", "execution_count"):
        raise invalid(f"--rate-limit must be off or execution_count, got {mode!r}")
    if mode == "off" and resources:
        raise invalid("--rate-limit-resource needs --rate-limit execution_count")
    limits: dict[tuple[str, str | None], int] = {}
    for text in resources:
        name, _, rest = text.partition(":")
        count, _, device = rest.partition(":")
        if not name or not count.isdigit() or (device and not (device.isdigit() or device in (GLOBAL, "cpu"))):
            raise invalid("--rate-limit-resource must be NAME:COUNT or NAME:COUNT:DEVICE (a GPU's number, cpu or "
                          f"global), got {text!r}")  # fmt: skip
        limits[name, device or None] = int(count)
    return RateLimiter(limits) if mode == "execution_count" else None
