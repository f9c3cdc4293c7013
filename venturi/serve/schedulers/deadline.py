"""Dynamic batching towards a latency target: size and delay follow from what batches were measured to take. Pure.

Waiting pays only for requests that are about to come, and only as long as the oldest one's target allows: a batch goes
when the next arrival is overdue by the recent rate, or when running any later would miss the target. Sizes are bounded
so that a request that arrives just after a batch has started still meets its target behind it; under more load than
that allows they grow to the maximum, which clears the line fastest.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from venturi.serve.request import InferRequest
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher
from venturi.serve.schedulers.policy import Run, Wait
from venturi.serve.schedulers.queues import Entry, WaitingLine

_SLACK = 1.15  # of a measured latency: what a batch may take
_OVERDUE = 2.0  # recent gaps between arrivals after which nobody is expected
_MEMORY = 0.2


class LatencyTable:
    """Nanoseconds of a batch by its rows: running means, straight lines between and beyond them."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._means: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def record(self, rows: int, took_ns: int) -> None:
        if rows not in self._means:
            self._rows.insert(bisect_left(self._rows, rows), rows)
            self._means[rows] = float(took_ns)
        self._means[rows] += _MEMORY * (took_ns - self._means[rows])

    def estimate(self, rows: int) -> float:
        """Beyond the largest size known, time grows in proportion; below the smallest, it does not shrink."""
        at = bisect_left(self._rows, rows)
        if at == len(self._rows):
            return self._means[self._rows[-1]] * rows / self._rows[-1]
        above = self._rows[at]
        if above == rows or at == 0:
            return self._means[above]
        below = self._rows[at - 1]
        share = (rows - below) / (above - below)
        return self._means[below] * (1 - share) + self._means[above] * share

    def largest_within(self, budget_ns: float, most: int) -> int:
        """Rows, at least 1. When the largest size known fits, sizes up to twice as large may be tried."""
        largest = self._rows[-1]
        if self._means[largest] <= budget_ns:
            return min(most, 2 * largest)
        return max((n for n in range(1, min(most, largest) + 1) if self.estimate(n) <= budget_ns), default=1)


class DeadlineBatcher(DynamicBatcher):
    """Answers within `target_us` of arrival where the load allows it, in batches as large as that allows."""

    def __init__(self, max_batch: int, target_us: int, line: WaitingLine | None = None) -> None:
        super().__init__(BatchingRules(max_batch), line)
        self.starts_at_once = False  # arrivals are what it learns from
        self._most, self._target_ns = max_batch, target_us * 1000
        self._table = LatencyTable()
        self._started: dict[InferRequest, tuple[int, int]] = {}
        self._last_ns: int | None = None
        self._gap_ns: float | None = None

    def add(self, request: InferRequest, now_ns: int) -> None:
        super().add(request, now_ns)
        if self._last_ns is not None:
            gap = now_ns - self._last_ns
            self._gap_ns = gap if self._gap_ns is None else self._gap_ns + _MEMORY * (gap - self._gap_ns)
        self._last_ns = now_ns

    def take(self, now_ns: int, instance: int = 0) -> Run | Wait:
        gathered, closed = self._bounded(now_ns)
        if not gathered:
            return Wait()
        rows = self._rows(gathered)
        until = self._worth_waiting(min(e.arrived_ns for e in gathered), rows)
        if not closed and now_ns < until:
            return Wait(until)
        requests = self._line.pop(gathered)
        self._started[requests[0]] = (now_ns, rows)
        return Run(requests)

    def _bounded(self, now_ns: int) -> tuple[list[Entry], bool]:
        """What should run together, and whether it is complete. The bound falls when the target is missed anyway."""
        if self._table:
            cap = self._table.largest_within(self._target_ns / 2 / _SLACK, self._most)
            self._rules = replace(self._rules, max_batch=cap)
            gathered, closed, _ = self._gather()
            oldest = min((e.arrived_ns for e in gathered), default=now_ns)
            took = self._table.estimate(max(self._rows(gathered), 1))
            if not closed or now_ns + took <= oldest + self._target_ns:
                return gathered, closed
        self._rules = replace(self._rules, max_batch=self._most)
        gathered, closed, _ = self._gather()
        return gathered, closed

    def again(self, request: InferRequest, now_ns: int) -> bool:
        return False

    def done(self, requests: list[InferRequest], now_ns: int) -> None:
        started = self._started.pop(requests[0], None)
        if started is not None:
            self._table.record(started[1], now_ns - started[0])

    def _worth_waiting(self, oldest_ns: int, rows: int) -> int:
        """Until when the gathered requests should wait for one more; in the past for not at all."""
        if not self._table or self._gap_ns is None or self._last_ns is None:
            return oldest_ns
        latest = oldest_ns + self._target_ns - _SLACK * self._table.estimate(rows + 1)
        return int(min(latest, self._last_ns + _OVERDUE * self._gap_ns))
