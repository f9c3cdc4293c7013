"""Keeps a number of requests in flight, or sends at a rate, and sorts the answers into windows until they agree."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from venturi.core.errors import RequestError
from venturi.serve.perf.target import Call, Target
from venturi.serve.perf.windows import Figure, Window, breakdown, figure, is_stable

_LATE_S = 0.001
_MAX_IN_FLIGHT = 1024


@dataclass(frozen=True)
class Rules:
    """Windows of `window_s` until three in a row agree within `share`, at most `max_windows`; percentile None: mean."""

    window_s: float = 1.0
    share: float = 0.1
    max_windows: int = 10
    percentile: int | None = None


class Recorder:
    """The windows of one level of load, as the answers come in."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.windows: list[Window] = []
        self._open = Window(rules.window_s)
        self.last_error: RequestError | None = None

    def add(self, sent: float, arrived: float, error: RequestError | None, late: bool) -> None:
        if error is None:
            self._open.latencies_us.append((arrived - sent) * 1e6)
        else:
            self._open.errors += 1
            self.last_error = error
        self._open.late += late

    async def run(self) -> bool:
        """Closes a window after the other; True when the last ones agree."""
        started = time.perf_counter()
        while len(self.windows) < self._rules.max_windows:
            await asyncio.sleep(self._rules.window_s)
            now = time.perf_counter()
            closed, self._open = self._open, Window(self._rules.window_s)
            closed.seconds, started = now - started, now
            self.windows.append(closed)
            if closed.errors and not closed.latencies_us:
                assert self.last_error is not None, "errors are remembered"
                raise self.last_error
            if is_stable(self.windows, self._rules.share, self._rules.percentile):
                return True
        return False


async def at_concurrency(target: Target, count: int, rows: int, rules: Rules) -> Figure:
    """`count` clients, each sending its next request when the last is answered."""
    calls = [await target.connect() for _ in range(count)]

    async def client(call: Call, recorder: Recorder) -> None:
        while True:
            await _one(call, recorder, time.perf_counter(), False)

    return await _measured(
        target, {"concurrency": count}, rows, rules, lambda recorder: [client(c, recorder) for c in calls]
    )


async def at_rate(target: Target, per_s: float, rows: int, rules: Rules, *, poisson: bool = False) -> Figure:
    """Requests at their times, whatever the answers: latency counts from when a request was due."""
    rng = random.Random(0)
    free: list[Call] = []
    in_flight: set[asyncio.Task[None]] = set()

    async def send(recorder: Recorder, due: float) -> None:
        call = free.pop() if free else await target.connect()
        late = time.perf_counter() - due > _LATE_S
        await _one(call, recorder, due, late)
        free.append(call)

    async def clock(recorder: Recorder) -> None:
        due = time.perf_counter()
        while True:
            due += rng.expovariate(per_s) if poisson else 1 / per_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(in_flight) >= _MAX_IN_FLIGHT:
                raise RequestError(f"{_MAX_IN_FLIGHT} requests wait for an answer: the server cannot take {per_s:g}/s")
            task = asyncio.ensure_future(send(recorder, due))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)

    found = await _measured(target, {"request_rate": per_s}, rows, rules, lambda recorder: [clock(recorder)])
    for task in in_flight:
        task.cancel()
    return found


async def _one(call: Call, recorder: Recorder, sent: float, late: bool) -> None:
    error = None
    try:
        await call()
    except RequestError as exc:
        error = exc
        await asyncio.sleep(0.001)
    recorder.add(sent, time.perf_counter(), error, late)


async def _measured(
    target: Target, load: dict[str, float], rows: int, rules: Rules,
    start: Callable[[Recorder], list[Coroutine[Any, Any, None]]],
) -> Figure:  # fmt: skip
    recorder = Recorder(rules)
    before = await target.statistics()
    tasks = [asyncio.ensure_future(work) for work in start(recorder)]
    watching = asyncio.ensure_future(recorder.run())
    try:
        await asyncio.wait([watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for ended in tasks:
            if ended.done():
                ended.result()
        stable = await watching
    finally:
        watching.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)
    after = await target.statistics()
    server = breakdown(before, after) if before is not None and after is not None else {}
    return figure(load, recorder.windows, rows, stable, server)
