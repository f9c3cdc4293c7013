"""Threads that serve requests from a bounded queue, joining them into batches along axis 0 within a bounded delay."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from venturi.core.errors import RequestError

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Batching:
    """At most `max_batch` rows a run, `max_delay_ms` of waiting for more rows, `max_queue` requests waiting."""

    max_batch: int = 8
    max_delay_ms: float = 2.0
    max_queue: int = 1024


@dataclass
class _Request:
    inputs: Mapping[str, Any]
    rows: int
    key: tuple[Any, ...]
    future: Future[Outputs]


class Worker:
    """Threads that serve one queue. With `batching`, requests of equal row shape and type run together.

    Thread i calls `start(i)` once, then `run(i, inputs)`.
    """

    def __init__(
        self,
        run: Callable[[int, Mapping[str, Any]], Outputs],
        batching: Batching | None,
        threads: int = 1,
        start: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._run, self._start = run, start
        self._batching = batching
        self._queue: queue.Queue[_Request | None] = queue.Queue(batching.max_queue if batching else 1024)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, args=(i,), name=f"venturi-submit-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, inputs: Mapping[str, Any]) -> Future[Outputs]:
        """Raises RequestError when the queue is full."""
        shapes = {n: np.shape(x) for n, x in inputs.items()}
        rows = {s[0] if s else -1 for s in shapes.values()}
        key = tuple((n, s[1:], str(getattr(inputs[n], "dtype", ""))) for n, s in sorted(shapes.items()))
        request = _Request(dict(inputs), rows.pop() if len(rows) == 1 else -1, key, Future())
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            raise RequestError(f"the queue is full ({self._queue.maxsize} requests wait); try again later") from None
        self._fail_late_ones()
        return request.future

    def call(self, inputs: Mapping[str, Any]) -> Outputs:
        """The outputs of a request that joins no other; waits for room in the queue."""
        request = _Request(inputs, -1, (), Future())
        self._queue.put(request)
        self._fail_late_ones()
        return request.future.result()

    def close(self) -> None:
        """Finish what is queued, then stop. What comes meanwhile gets a RequestError."""
        for _ in self._threads:
            self._queue.put(None)
        self._closed = True
        self._fail_late_ones()

    def _fail_late_ones(self) -> None:
        """Once closed: those that were queued behind the end."""
        if not self._closed or threading.current_thread() in self._threads:
            return
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                late = self._queue.get_nowait()
                if late is not None and late.future.set_running_or_notify_cancel():
                    late.future.set_exception(
                        RequestError("the engine was closed before the request ran; send it again")
                    )

    def _loop(self, number: int) -> None:
        self._start(number)
        held: _Request | None = None
        while True:
            first = held or self._queue.get()
            if first is None:
                return
            group, held, closing = self._gather(first)
            self._serve(number, group)
            if closing:
                return

    def _gather(self, first: _Request) -> tuple[list[_Request], _Request | None, bool]:
        """(those to run together, one that came after them and did not fit, whether to stop then)."""
        group = [first]
        if self._batching is None or first.rows < 1:
            return group, None, False
        deadline = time.monotonic() + self._batching.max_delay_ms / 1e3
        total = first.rows
        while total < self._batching.max_batch:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return group, None, True
            if item.key != first.key or item.rows < 1 or total + item.rows > self._batching.max_batch:
                return group, item, False
            group.append(item)
            total += item.rows
        return group, None, False

    def _serve(self, number: int, group: list[_Request]) -> None:
        live = [r for r in group if r.future.set_running_or_notify_cancel()]
        if not live:
            return
        try:
            if len(live) == 1:
                live[0].future.set_result(self._run(number, live[0].inputs))
                return
            joined = {n: np.concatenate([np.asarray(r.inputs[n]) for r in live]) for n in live[0].inputs}
            outputs = self._run(number, joined)
            total = sum(r.rows for r in live)
            if any(np.ndim(o) == 0 or np.shape(o)[0] != total for o in outputs.values()):
                raise RequestError("an output has no batch axis, so requests cannot be batched; set batching to None")
            start = 0
            for request in live:
                part = {n: o[start : start + request.rows] for n, o in outputs.items()}
                start += request.rows
                request.future.set_result(part)
        except BaseException as exc:
            for request in live:
                if not request.future.done():
                    request.future.set_exception(exc)
