"""Applies a policy: hands batches to free instances, wakes up for delays and timeouts, answers what never runs.

Thread-safe: requests may come from any thread, batches end on the instances' threads. One lock guards the line and the
counts; models run outside it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from venturi.serve.errors import ServeError, Status, as_serve_error, unavailable
from venturi.serve.instance import Instance
from venturi.serve.models.base import Answer, Later
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.schedulers.alarm import ALARM
from venturi.serve.schedulers.policy import Policy, Run
from venturi.serve.statistics import ModelStatistics

Result = InferResponse | ServeError
Done = Callable[[Result], None]
_DRAIN_POLL_S = 0.005
MAX_OPEN = 8192  # requests accepted and not answered, where a configuration sets no smaller max_queue_size


class Driver:
    """One model version's scheduler. `preserve_order` releases answers in the order of arrival.

    `max_open` bounds the memory that waiting requests take, whatever the configuration says.
    """

    def __init__(
        self,
        policy: Policy,
        instances: Sequence[Instance],
        statistics: ModelStatistics,
        *,
        preserve_order: bool = False,
        max_open: int = MAX_OPEN,
    ) -> None:
        self._lock = threading.Lock()
        self._policy = policy
        self._idle: deque[Instance] = deque(instances)
        self._instances = list(instances)
        self._numbers = {instance: i for i, instance in enumerate(instances)}
        self._statistics = statistics
        self._answers: dict[InferRequest, Done] = {}
        self._order: deque[InferRequest] | None = deque() if preserve_order else None
        self._held: dict[InferRequest, Result] = {}
        self._outbox: deque[tuple[Done, Result]] = deque()
        self._delivering = threading.Lock()
        self._alarm_ns: int | None = None
        self._closing = False
        self._max_open = max_open
        self._gathering = 0

    @property
    def num_open(self) -> int:
        """Requests accepted and not answered."""
        return len(self._answers)

    def submit(self, request: InferRequest, done: Done) -> None:
        """`done` is called once, on any thread, possibly before this returns; it must be quick.

        Raises ServeError UNAVAILABLE when the queue is full or the version is being unloaded.
        """
        now = request.times.queued = time.perf_counter_ns()
        with self._lock:
            if self._closing:
                raise unavailable(request.label + "the model version is being unloaded")
            try:
                if len(self._answers) >= self._max_open:
                    raise unavailable(f"{request.label}Exceeds maximum queue size: {self._max_open} requests are open")
                at_once, gathering = self._free_for_one(), self._gathering > 0
                if at_once is None:
                    self._policy.add(request, now)
            except ServeError:
                self._statistics.record_failure(request, "REJECTED")
                raise
            self._answers[request] = done
            request.finish = self._finish_late
            if self._order is not None:
                self._order.append(request)
            if at_once is None:
                self._statistics.pending += 1
        if (at_once is None or self._finish(at_once, [request], at_once.run_here([request]))) and not gathering:
            self._pump()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests submitted meanwhile are in the line when the first of them is looked at, as if they had come at
        once."""
        with self._lock:
            self._gathering += 1
        try:
            yield
        finally:
            with self._lock:
                self._gathering -= 1
            self._pump()

    def cancel(self, request: InferRequest) -> None:
        """A request that still waits is answered CANCELLED and never runs; one that runs is left alone."""
        with self._lock:
            request.is_cancelled = True
            for gone in self._policy.cancel(request) if request in self._answers else ():
                error = ServeError(Status.CANCELLED, gone.label + "request cancelled")
                self._fail_waiting(gone, "CANCELED", error)
        self._deliver()

    def record_hit(self, request: InferRequest, lookup_ns: int) -> None:
        """A request that a cache has answered counts as a success."""
        with self._lock:
            self._statistics.record_hit(request, lookup_ns)

    def record_miss(self, spent_ns: int) -> None:
        """Looking an answer up in vain and keeping the one that was computed."""
        with self._lock:
            self._statistics.cache_miss.add(spent_ns)

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one is answered.

        Waits without a thread, so that giving up leaves nothing behind that keeps the process alive.
        """
        with self._lock:
            self._closing = True
        while self._answers:
            await asyncio.sleep(_DRAIN_POLL_S)
        for instance in self._instances:
            instance.close()

    def _pump(self) -> None:
        """Give work to free instances until there is none of either."""
        while True:
            with self._lock:
                now = time.perf_counter_ns()
                for request in self._policy.expire(now):
                    text = request.label + self._policy.expired_message
                    self._fail_waiting(request, "REJECTED", unavailable(text))
                found = self._decide(now)
                if found is not None:
                    instance, decision = found
                    self._statistics.pending -= sum(not r.is_null for r in decision.requests)
            self._deliver()
            if found is None:
                return
            if instance.is_fast:
                if not self._finish(instance, decision.requests, instance.run_here(decision.requests)):
                    return
            else:
                instance.run(decision.requests, self._finished)

    def _free_for_one(self) -> Instance | None:
        """Takes an idle instance that answers on this thread, where the request now arriving would run at once."""
        if self._gathering or not self._policy.starts_at_once or len(self._policy):
            return None
        return self._idle.popleft() if self._idle and self._idle[0].is_fast else None

    def _decide(self, now: int) -> tuple[Instance, Run] | None:
        """A free instance and its batch; or an alarm for when there may be one."""
        until: list[int] = []
        for instance in list(self._idle) if self._policy.by_instance else list(self._idle)[:1]:
            decision = self._policy.take(now, self._numbers[instance])
            if isinstance(decision, Run):
                self._idle.remove(instance)
                return instance, decision
            if decision.until_ns is not None:
                until.append(decision.until_ns)
        self._set_alarm(min(until, default=None))
        return None

    def _set_alarm(self, until: int | None) -> None:
        deadline = self._policy.next_deadline()
        times = [t for t in (until, deadline) if t is not None]
        if times and (self._alarm_ns is None or min(times) < self._alarm_ns):
            self._alarm_ns = min(times)
            ALARM.at(self._alarm_ns, self._ring)

    def _ring(self) -> None:
        with self._lock:
            self._alarm_ns = None
        self._pump()

    def _finished(self, instance: Instance, requests: list[InferRequest], result: object) -> None:
        """Called by an instance, on its thread."""
        self._finish(instance, requests, result)
        self._pump()

    def _finish(self, instance: Instance, requests: list[InferRequest], result: object) -> bool:
        """Whether the policy has more to do, now or at some time."""
        with self._lock:
            self._idle.append(instance)
            if isinstance(result, BaseException):
                result = [as_serve_error(result)] * len(requests)
            assert isinstance(result, Sequence)
            now = time.perf_counter_ns()
            pairs = list(zip(requests, result, strict=True))
            open_ = [(q, self._again(q, answer, now)) for q, answer in pairs if self._waits(q)]
            self._policy.done(requests, now)
            fine = [q for q, answer in open_ if isinstance(answer, InferResponse)]
            if fine:
                self._statistics.record_batch(fine)
            for request, answer in open_:
                if answer is not None:
                    self._conclude(request, answer)
            more = len(self._policy) > 0 or self._policy.next_deadline() is not None
        self._deliver()
        return more

    def _again(self, request: InferRequest, answer: Answer, now: int) -> Result | None:
        """Put a request that shall run again in line, unless nobody waits for it or the model may not ask for that."""
        if not isinstance(answer, Later):
            return answer
        if request.is_cancelled:
            return ServeError(Status.CANCELLED, "request cancelled")
        if not self._policy.again(request, now):
            return ServeError(Status.INTERNAL, "the model reschedules the request but is no iterative_sequence")
        self._statistics.pending += 1
        return None

    def _waits(self, request: InferRequest) -> bool:
        """Not answered yet, nor answered and held back for the order."""
        return request in self._answers and request not in self._held

    def _finish_late(self, request: InferRequest, answer: Result) -> None:
        """A model answers after its `execute` returned; on any thread. A second answer is not heard."""
        with self._lock:
            if self._waits(request):
                request.times.end = time.perf_counter_ns()
                if isinstance(answer, InferResponse):
                    self._statistics.record_batch([request])
                self._conclude(request, answer)
        self._deliver()

    def _conclude(self, request: InferRequest, answer: Result) -> None:
        if isinstance(answer, ServeError):
            self._statistics.record_failure(request, "BACKEND")
            answer = ServeError(answer.status, request.label + answer.message, where=answer.where)
        self._answer(request, answer)

    def _fail_waiting(self, request: InferRequest, reason: str, error: ServeError) -> None:
        self._statistics.pending -= 1
        self._statistics.record_failure(request, reason)
        self._answer(request, error)

    def _answer(self, request: InferRequest, result: Result) -> None:
        if self._order is None:
            self._release(request, result)
            return
        self._held[request] = result
        while self._order and self._order[0] in self._held:
            first = self._order.popleft()
            self._release(first, self._held.pop(first))

    def _release(self, request: InferRequest, result: Result) -> None:
        self._outbox.append((self._answers.pop(request), result))

    def _deliver(self) -> None:
        """Outside the lock, since an ensemble's next step may start here. One thread at a time, so in order."""
        while self._outbox and self._delivering.acquire(blocking=False):
            try:
                while self._outbox:
                    done, result = self._outbox.popleft()
                    done(result)
            finally:
                self._delivering.release()
