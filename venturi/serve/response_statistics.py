"""What became of the responses of decoupled models, by their place among those of a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from venturi.serve.errors import ServeError, Status
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.statistics import Duration, Histogram

FIRST_BUCKETS_MS = (100, 500, 2000, 5000)
Result = InferResponse | ServeError


@dataclass
class ResponseCounts:
    """compute_infer: from the response before, or from the request's turn. compute_output: handing it on. The others
    say how it ended, both times together."""

    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    empty_response: Duration = field(default_factory=Duration)
    cancel: Duration = field(default_factory=Duration)

    def to_json(self) -> dict[str, dict[str, int]]:
        return {name: getattr(self, name).to_json() for name in self.__dataclass_fields__}


class ResponseStatistics:
    """Of one model version; written by any thread. `first`: milliseconds from a request to its first response."""

    def __init__(self) -> None:
        self.first = Histogram(FIRST_BUCKETS_MS)
        self._counts: list[ResponseCounts] = []
        self._lock = threading.Lock()

    def watched(
        self, request: InferRequest, done: Callable[[Result], None]
    ) -> tuple[Callable[[InferResponse], None] | None, Callable[[Result], None]]:
        """The request's `emit` and `done`, counted."""
        emit, place, before = request.emit, 0, 0

        def give(result: Result, on: Callable[[Result], None]) -> None:
            nonlocal place, before
            now = time.perf_counter_ns()
            on(result)
            end = time.perf_counter_ns()
            since = before or request.times.compute or request.times.start
            self._add(place, result, now - since, end - now, 0 if place else now - request.times.start)
            place, before = place + 1, end

        def emitted(response: InferResponse) -> None:
            assert emit is not None, "given to requests that have it"
            give(response, lambda _: emit(response))

        return (None if emit is None else emitted), lambda result: give(result, done)

    def _add(self, place: int, result: Result, infer_ns: int, output_ns: int, first_ns: int) -> None:
        with self._lock:
            while len(self._counts) <= place:
                self._counts.append(ResponseCounts())
            counts = self._counts[place]
            if isinstance(result, ServeError):
                ended = counts.cancel if result.status == Status.CANCELLED else counts.fail
            else:
                ended = counts.success if result.outputs else counts.empty_response
                counts.compute_infer.add(infer_ns)
                counts.compute_output.add(output_ns)
            ended.add(infer_ns + output_ns)
            if place == 0 and not isinstance(result, ServeError):
                self.first.add(first_ns / 1e6)

    def to_json(self) -> dict[str, dict[str, dict[str, int]]]:
        with self._lock:
            return {str(place): counts.to_json() for place, counts in enumerate(self._counts)}
