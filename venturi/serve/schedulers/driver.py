"""Applies a policy: hands batches to free instances, wakes up for delays and timeouts, answers what never runs.

Everything here happens on the event loop; instances run batches on threads of their own and report back to it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from venturi.serve.errors import ServeError, Status, as_serve_error, unavailable
from venturi.serve.instance import Instance
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.schedulers.policy import Policy, Run
from venturi.serve.statistics import ModelStatistics

Answer = asyncio.Future[InferResponse]


class Driver:
    """One model version's scheduler. `preserve_order` releases answers in the order of arrival."""

    def __init__(
        self,
        policy: Policy,
        instances: Sequence[Instance],
        statistics: ModelStatistics,
        *,
        preserve_order: bool = False,
    ) -> None:
        self._policy = policy
        self._idle: deque[Instance] = deque(instances)
        self._instances = list(instances)
        self._statistics = statistics
        self._answers: dict[InferRequest, Answer] = {}
        self._order: deque[InferRequest] | None = deque() if preserve_order else None
        self._done: dict[InferRequest, InferResponse | ServeError] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._drained = asyncio.Event()
        self._drained.set()
        self._closing = False

    @property
    def num_open(self) -> int:
        """Requests accepted and not answered."""
        return len(self._answers)

    def submit(self, request: InferRequest) -> Answer:
        """Raises ServeError UNAVAILABLE when the queue is full or the version is being unloaded."""
        if self._closing:
            raise unavailable(request.label + "the model version is being unloaded")
        request.times.queued = time.perf_counter_ns()
        try:
            self._policy.add(request, request.times.queued)
        except ServeError:
            self._statistics.record_failure(request, "REJECTED")
            raise
        answer: Answer = self._loop.create_future()
        self._answers[request] = answer
        self._drained.clear()
        self._statistics.pending += 1
        if self._order is not None:
            self._order.append(request)
        answer.add_done_callback(lambda done: self._abandoned(request) if done.cancelled() else None)
        self._pump()
        return answer

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one is answered."""
        self._closing = True
        await self._drained.wait()
        if self._timer is not None:
            self._timer.cancel()
        for instance in self._instances:
            instance.close()

    def _pump(self) -> None:
        now = time.perf_counter_ns()
        expired = self._policy.expire(now)
        for request in expired.timed_out:
            self._fail_waiting(request, "REJECTED", unavailable(request.label + "Request timeout expired"))
        for request in expired.cancelled:
            self._fail_waiting(request, "CANCELED", ServeError(Status.CANCELLED, request.label + "request cancelled"))
        until: int | None = None
        while self._idle:
            decision = self._policy.take(now)
            if not isinstance(decision, Run):
                until = decision.until_ns
                break
            self._statistics.pending -= len(decision.requests)
            self._idle.popleft().run(decision.requests, self._finished)
        self._set_timer(now, until)

    def _set_timer(self, now: int, until: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._policy.next_deadline()
        times = [t for t in (until, deadline) if t is not None]
        if times:
            self._timer = self._loop.call_later(max(min(times) - now, 0) / 1e9, self._pump)

    def _fail_waiting(self, request: InferRequest, reason: str, error: ServeError) -> None:
        self._statistics.pending -= 1
        self._statistics.record_failure(request, reason)
        self._answer(request, error)

    def _finished(
        self, instance: Instance, requests: list[InferRequest], result: list[InferResponse] | BaseException
    ) -> None:
        """Called by an instance, on the event loop."""
        self._idle.append(instance)
        self._statistics.record_batch(requests, isinstance(result, BaseException))
        if isinstance(result, BaseException):
            error = as_serve_error(result)
            for request in requests:
                self._answer(request, ServeError(error.status, request.label + error.message, where=error.where))
        else:
            for request, response in zip(requests, result, strict=True):
                self._answer(request, response)
        self._pump()

    def _answer(self, request: InferRequest, result: InferResponse | ServeError) -> None:
        if self._order is None:
            self._release(request, result)
            return
        self._done[request] = result
        while self._order and self._order[0] in self._done:
            first = self._order.popleft()
            self._release(first, self._done.pop(first))

    def _release(self, request: InferRequest, result: InferResponse | ServeError) -> None:
        answer = self._answers.pop(request)
        if not answer.done():
            if isinstance(result, ServeError):
                answer.set_exception(result)
            else:
                answer.set_result(result)
        if not self._answers:
            self._drained.set()

    def _abandoned(self, request: InferRequest) -> None:
        """Nobody waits for the answer any more: a request still in the line never runs."""
        if request in self._answers:
            request.cancelled = True
            self._loop.call_soon(self._pump)
