"""The dynamic batcher's rules, and the rule of models that do not batch. Pure: times come in as numbers.

The semantics are those of Triton's dynamic batcher: the largest prefix of the line that hits a preferred size goes at
once; when the oldest request has waited for the maximum delay everything gathered goes; requests are never split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from venturi.serve.request import InferRequest
from venturi.serve.schedulers.policy import Run, Wait
from venturi.serve.schedulers.queues import Entry, WaitingLine


@dataclass(frozen=True)
class BatchingRules:
    """Rows a batch may have, sizes worth running at once, how long the oldest request waits for more (microseconds)."""

    max_batch: int
    preferred: tuple[int, ...] = ()
    max_delay_us: int = 0


class OneByOne:
    """Every request runs alone, in the order of arrival."""

    expired_message = "Request timeout expired"
    by_instance = False
    starts_at_once = True

    def __init__(self, line: WaitingLine | None = None) -> None:
        self._line = WaitingLine() if line is None else line

    def __len__(self) -> int:
        return len(self._line)

    def add(self, request: InferRequest, now_ns: int) -> None:
        self._line.add(request, now_ns)

    def expire(self, now_ns: int) -> list[InferRequest]:
        return self._line.expire(now_ns)

    def cancel(self, request: InferRequest) -> list[InferRequest]:
        return [request] if self._line.cancel(request) else []

    def again(self, request: InferRequest, now_ns: int) -> bool:
        return False

    def done(self, requests: list[InferRequest], now_ns: int) -> None:
        """Nothing waits for it."""

    def next_deadline(self) -> int | None:
        return self._line.next_deadline()

    def take(self, now_ns: int, instance: int = 0) -> Run | Wait:
        for entry in self._line.entries():
            return Run(self._line.pop([entry]))
        return Wait()


class DynamicBatcher(OneByOne):
    """Joins requests whose inputs have the same names, types and row shapes."""

    def __init__(self, rules: BatchingRules, line: WaitingLine | None = None) -> None:
        super().__init__(line)
        self._rules = rules
        self.starts_at_once = not rules.max_delay_us

    def take(self, now_ns: int, instance: int = 0) -> Run | Wait:
        gathered, closed, preferred = self._gather()
        if not gathered:
            return Wait()
        due = min(e.arrived_ns for e in gathered) + self._rules.max_delay_us * 1000
        if closed or now_ns >= due or self._rows(gathered) >= max(self._rules.preferred, default=1 << 62):
            chosen = gathered if now_ns >= due or not preferred else gathered[:preferred]
            return Run(self._line.pop(chosen))
        if preferred:
            return Run(self._line.pop(gathered[:preferred]))
        return Wait(due)

    def _gather(self) -> tuple[list[Entry], bool, int]:
        """(requests that fit together, whether the next one does not, length of the largest preferred prefix)."""
        found: list[Entry] = []
        rows, preferred = 0, 0
        key: tuple[object, ...] | None = None
        for entry in self._line.entries():
            if found:
                key = key or batch_key(found[0].request)
                if rows + entry.request.rows > self._rules.max_batch or batch_key(entry.request) != key:
                    return found, True, preferred
            found.append(entry)
            rows += entry.request.rows
            if rows in self._rules.preferred:
                preferred = len(found)
            if rows >= self._rules.max_batch:
                return found, True, preferred
        return found, False, preferred

    @staticmethod
    def _rows(entries: Sequence[Entry]) -> int:
        return sum(e.request.rows for e in entries)


def batch_key(request: InferRequest) -> tuple[object, ...]:
    """What requests must share to run together: input names and the shapes of their rows."""
    return tuple((n, t.data.shape[1:]) for n, t in sorted(request.inputs.items()))
