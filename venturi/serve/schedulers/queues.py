"""The waiting line: priorities, size limits, timeouts. Order: priority level, then arrival; then the delayed ones."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from venturi.serve.errors import unavailable
from venturi.serve.request import InferRequest


@dataclass(frozen=True)
class QueuePolicy:
    """`timeout_us` and `max_size` 0 mean none; `delays`: a late request goes behind all others instead of failing."""

    delays: bool = False
    timeout_us: int = 0
    allow_override: bool = False
    max_size: int = 0


@dataclass(eq=False)
class Entry:
    request: InferRequest
    arrived_ns: int
    deadline_ns: int | None
    delayed: bool = False
    gone: bool = False


class WaitingLine:
    """Level 1 goes first; 0 and levels beyond the last mean `default_level`."""

    def __init__(
        self, levels: int = 0, default_level: int = 0, default: QueuePolicy = QueuePolicy(),
        by_level: Mapping[int, QueuePolicy] | None = None,
    ) -> None:  # fmt: skip
        self._levels = max(levels, 1)
        self._default_level = default_level or 1
        self._policies = {n: (by_level or {}).get(n, default) for n in range(1, self._levels + 1)}
        self._fresh: dict[int, deque[Entry]] = {n: deque() for n in self._policies}
        self._late: dict[int, deque[Entry]] = {n: deque() for n in self._policies}
        self._counts = dict.fromkeys(self._policies, 0)
        self._deadlines: list[tuple[int, int, Entry]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, request: InferRequest, now_ns: int) -> None:
        level = request.priority if 1 <= request.priority <= self._levels else self._default_level
        policy = self._policies[level]
        if policy.max_size and self._counts[level] >= policy.max_size:
            raise unavailable(request.label + "Exceeds maximum queue size")
        entry = Entry(request, now_ns, _deadline(policy, request, now_ns))
        self._fresh[level].append(entry)
        self._counts[level] += 1
        if entry.deadline_ns is not None:
            self._num_added += 1
            heapq.heappush(self._deadlines, (entry.deadline_ns, self._num_added, entry))

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0][2].gone:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now_ns: int) -> list[InferRequest]:
        """A deadline is reached, not passed: a request waits for less than its timeout."""
        late: list[InferRequest] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now_ns:
            entry = heapq.heappop(self._deadlines)[2]
            level, policy = self._place(entry)
            if policy.delays:
                self._fresh[level].remove(entry)
                entry.delayed = True
                self._late[level].append(entry)
            else:
                self._remove(level, entry)
                late.append(entry.request)
        return late

    def cancel(self, request: InferRequest) -> bool:
        """Take the request out; False when it is not waiting. Looks through the whole line."""
        for entry in self.entries():
            if entry.request is request:
                self._remove(self._place(entry)[0], entry)
                return True
        return False

    def entries(self) -> Iterator[Entry]:
        """In the order of service."""
        for line in (*self._fresh.values(), *self._late.values()):
            yield from line

    def pop(self, entries: list[Entry]) -> list[InferRequest]:
        """Take these out; they are the first ones, so each is at the head of its line."""
        for entry in entries:
            level, _ = self._place(entry)
            line = (self._late if entry.delayed else self._fresh)[level]
            assert line[0] is entry, "only the first requests leave"
            line.popleft()
            entry.gone = True
            self._counts[level] -= 1
        return [e.request for e in entries]

    def check_integrity(self) -> None:
        for level, count in self._counts.items():
            lines = (*self._fresh[level], *self._late[level])
            assert len(lines) == count, f"level {level}: {len(lines)} requests, counted {count}"
            assert not any(e.gone for e in lines)

    def _place(self, entry: Entry) -> tuple[int, QueuePolicy]:
        priority = entry.request.priority
        level = priority if 1 <= priority <= self._levels else self._default_level
        return level, self._policies[level]

    def _remove(self, level: int, entry: Entry) -> None:
        (self._late if entry.delayed else self._fresh)[level].remove(entry)
        entry.gone = True
        self._counts[level] -= 1


def _deadline(policy: QueuePolicy, request: InferRequest, now_ns: int) -> int | None:
    """A request's own timeout may only shorten the policy's."""
    timeout = policy.timeout_us
    if policy.allow_override and request.timeout_us and (not timeout or request.timeout_us < timeout):
        timeout = request.timeout_us
    return now_ns + timeout * 1000 if timeout else None
