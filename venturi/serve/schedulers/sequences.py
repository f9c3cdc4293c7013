"""Requests of one sequence reach one place in order. Pure rules: times come in as numbers.

Direct: a sequence owns a row of one instance's batch while it lives; rows without a request run as null requests.
Oldest: the heads of the oldest sequences are batched like any requests, one of each sequence at a time.
Semantics are those of Triton's sequence batcher.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from venturi.serve.errors import invalid
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher
from venturi.serve.schedulers.policy import Run, Wait

_FIRST_OWN_ID = 1 << 62
EXPIRED = "timeout of the corresponding sequence has been expired"


@dataclass(frozen=True)
class SequenceRules:
    """slots: sequences an instance serves at once. idle_us: a sequence that is silent for so long gives up its slot.

    delay_us, least_share: direct only; a batch with fewer ready rows than that share of `slots` waits for the delay.
    iterative: the model may ask for a request to run again; a request without a correlation id is its own sequence.
    """

    model: str
    instances: int = 1
    slots: int = 1
    idle_us: int = 1_000_000
    delay_us: int = 0
    least_share: float = 0.0
    iterative: bool = False


@dataclass(eq=False)
class Sequence:
    """One live sequence. `slot` is (row, instance) once it has one; `state` is for the model's own tensors."""

    id: int | str
    last_ns: int
    waiting: deque[tuple[InferRequest, int]] = field(default_factory=deque)
    slot: tuple[int, int] | None = None
    is_over: bool = False
    in_flight: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)


class SequenceLine:
    """Which sequences live, who holds which slot, who waits for one."""

    expired_message = EXPIRED
    by_instance = True
    starts_at_once = False

    def __init__(self, rules: SequenceRules) -> None:
        self._rules = rules
        self._own_ids = itertools.count(_FIRST_OWN_ID)
        self._live: dict[int | str, Sequence] = {}
        self._held: dict[tuple[int, int], Sequence] = {}
        self._backlog: deque[Sequence] = deque()
        self._free = [(row, i) for row in range(rules.slots) for i in range(rules.instances)]
        heapq.heapify(self._free)

    def __len__(self) -> int:
        return sum(len(s.waiting) for s in self._all())

    def add(self, request: InferRequest, now_ns: int) -> None:
        alone = self._rules.iterative and request.sequence in (0, "")
        if alone:
            request.sequence, request.sequence_start = next(self._own_ids), True
        self._check(request)
        if request.sequence_start:
            known = self._live.pop(request.sequence, None)
            if known is not None:
                known.is_over = True
                self._release_if_done(known)
            self._begin(Sequence(request.sequence, now_ns))
        sequence = self._live.get(request.sequence)
        if sequence is None:
            raise invalid(
                f"{request.label}inference request for sequence {request.sequence} to model '{self._rules.model}' must "
                "specify the START flag on the first request of the sequence"
            )
        sequence.waiting.append((request, now_ns))
        sequence.last_ns = now_ns
        request.slot = sequence
        if request.sequence_end or alone:
            sequence.is_over = True
            del self._live[request.sequence]
        self._head_changed(sequence, now_ns)

    def cancel(self, request: InferRequest) -> list[InferRequest]:
        """A cancelled request takes its whole sequence with it."""
        sequence = request.slot
        if not isinstance(sequence, Sequence) or not any(r is request for r, _ in sequence.waiting):
            return []
        gone = [r for r, _ in sequence.waiting]
        sequence.waiting.clear()
        sequence.is_over = True
        if self._live.get(sequence.id) is sequence:
            del self._live[sequence.id]
        self._forget(gone)
        if sequence in self._backlog:
            self._backlog.remove(sequence)
        self._release_if_done(sequence)
        return gone

    def expire(self, now_ns: int) -> list[InferRequest]:
        """Ends idle sequences; returns the requests of those that waited too long for a slot."""
        late: list[InferRequest] = []
        for sequence in [s for s in self._backlog if any(t <= now_ns for t in _deadlines(s))]:
            late += self.cancel(sequence.waiting[0][0])
        for sequence in [s for s in self._held.values() if self._is_silent(s)]:
            if sequence.last_ns + self._rules.idle_us * 1000 <= now_ns:
                sequence.is_over = True
                if self._live.get(sequence.id) is sequence:
                    del self._live[sequence.id]
                self._release_if_done(sequence)
        return late

    def next_deadline(self) -> int | None:
        times = [s.last_ns + self._rules.idle_us * 1000 for s in self._held.values() if self._is_silent(s)]
        times += [t for s in self._backlog for t in _deadlines(s)]
        return min(times, default=None)

    def again(self, request: InferRequest, now_ns: int) -> bool:
        """It goes back to the head of its sequence, which it neither starts nor ends any more."""
        if not self._rules.iterative:
            return False
        assert isinstance(request.slot, Sequence), "requests of a batch belong to a sequence"
        request.sequence_start = request.sequence_end = False
        request.slot.waiting.appendleft((request, now_ns))
        return True

    def done(self, requests: list[InferRequest], now_ns: int) -> None:
        """These came back from an instance."""
        for request in requests:
            sequence = request.slot
            if isinstance(sequence, Sequence):
                sequence.in_flight = False
                sequence.last_ns = now_ns
                self._release_if_done(sequence)
                self._head_changed(sequence, now_ns)

    def _pop(self, sequence: Sequence) -> InferRequest:
        request, _ = sequence.waiting.popleft()
        sequence.in_flight = True
        return request

    def _head_changed(self, sequence: Sequence, now_ns: int) -> None:
        """A sequence may have a first request that it had not."""

    def _forget(self, requests: list[InferRequest]) -> None:
        """These will not run."""

    @staticmethod
    def _is_silent(sequence: Sequence) -> bool:
        return not sequence.waiting and not sequence.in_flight

    def _begin(self, sequence: Sequence) -> None:
        self._live[sequence.id] = sequence
        if self._free and not self._backlog:
            self._give(sequence)
        else:
            self._backlog.append(sequence)

    def _give(self, sequence: Sequence) -> None:
        sequence.slot = heapq.heappop(self._free)
        self._held[sequence.slot] = sequence

    def _release_if_done(self, sequence: Sequence) -> None:
        if not sequence.is_over or not self._is_silent(sequence):
            return
        if sequence in self._backlog:
            self._backlog.remove(sequence)
        if sequence.slot is None or self._held.get(sequence.slot) is not sequence:
            return
        del self._held[sequence.slot]
        heapq.heappush(self._free, sequence.slot)
        while self._free and self._backlog:
            promoted = self._backlog.popleft()
            self._give(promoted)
            self._head_changed(promoted, sequence.last_ns)

    def _check(self, request: InferRequest) -> None:
        if request.sequence in (0, ""):
            raise invalid(f"{request.label}inference request to model '{self._rules.model}' must specify a non-zero or "
                          "non-empty correlation ID")  # fmt: skip
        if request.rows > 1:
            raise invalid(f"{request.label}inference request to model '{self._rules.model}' must specify batch-size "
                          f"equal to 1 due to requirements of sequence batcher, got {request.rows}")  # fmt: skip

    def _all(self) -> Iterator[Sequence]:
        yield from self._held.values()
        yield from self._backlog


class DirectSequences(SequenceLine):
    """One batch: rows 0 to the highest that is ready."""

    def take(self, now_ns: int, instance: int) -> Run | Wait:
        ready = {row: s for (row, i), s in self._held.items() if i == instance and s.waiting and not s.in_flight}
        if not ready:
            return Wait()
        share, least = len(ready) / self._rules.slots, self._rules.least_share
        if self._rules.delay_us and share < least:
            due = min(s.waiting[0][1] for s in ready.values()) + self._rules.delay_us * 1000
            if now_ns < due:
                return Wait(due)
        rows = range(max(ready) + 1)
        return Run([self._pop(ready[r]) if r in ready else InferRequest("", "", {}, is_null=True) for r in rows])


class OldestSequences(SequenceLine):
    """The first requests of all sequences with a slot, through a dynamic batcher."""

    by_instance = False
    starts_at_once = False

    def __init__(self, rules: SequenceRules, batching: BatchingRules) -> None:
        super().__init__(rules)
        self._batcher = DynamicBatcher(batching)
        self._offered: set[InferRequest] = set()

    def take(self, now_ns: int, instance: int) -> Run | Wait:
        decision = self._batcher.take(now_ns, instance)
        if isinstance(decision, Run):
            for request in decision.requests:
                assert isinstance(request.slot, Sequence), "requests in line belong to a sequence"
                self._offered.discard(request)
                self._pop(request.slot)
        return decision

    def _head_changed(self, sequence: Sequence, now_ns: int) -> None:
        if sequence.slot is None or sequence.in_flight or not sequence.waiting:
            return
        head, _ = sequence.waiting[0]
        if head not in self._offered:
            self._offered.add(head)
            self._batcher.add(head, now_ns)

    def _forget(self, requests: list[InferRequest]) -> None:
        for request in requests:
            if request in self._offered:
                self._offered.discard(request)
                self._batcher.cancel(request)


def _deadlines(sequence: Sequence) -> Iterator[int]:
    """When the requests' own timeouts end."""
    for request, arrived in sequence.waiting:
        if request.timeout_us:
            yield arrived + request.timeout_us * 1000
