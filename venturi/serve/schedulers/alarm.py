"""One thread that calls functions at given times, for all schedulers of the process."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Alarm:
    """Functions are called on the alarm's thread and must be quick. Times are time.perf_counter_ns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def at(self, when_ns: int, call: Callable[[], None]) -> None:
        """Starts the thread at the first use. A call that is no longer wanted must find that out itself."""
        with self._changed:
            heapq.heappush(self._heap, (when_ns, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._ring, name="venturi-alarm", daemon=True)
                self._thread.start()
            elif self._heap[0][0] == when_ns:
                self._changed.notify()

    def _ring(self) -> None:
        while True:
            with self._changed:
                while not self._heap:
                    self._changed.wait()
                left_ns = self._heap[0][0] - time.perf_counter_ns()
                if left_ns > 0:
                    self._changed.wait(left_ns / 1e9)
                    continue
                call = heapq.heappop(self._heap)[2]
            call()


ALARM = Alarm()
