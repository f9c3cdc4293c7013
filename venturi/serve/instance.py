"""One copy of a model with a thread of its own.

A model that answers in less time than waking a thread takes is run by whoever has the request, for as long as it
stays that fast.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from venturi.serve.models.base import Answer, LoadedModel
from venturi.serve.request import InferRequest

Outcome = Sequence[Answer] | BaseException
Report = Callable[["Instance", list[InferRequest], object], None]
_FAST_US = 150.0  # of the thread's own time: waiting for the interpreter or a core does not count
_FAST_WALL_US = 500.0
_SLOW_US = 1000.0
_WINDOW = 20
_MAX_STRIKES = 3.0
_RECOVERY = 0.1  # a fast run; a busy machine stretches one in a hundred, a model that became slow all
_PENALTY_RUNS = 1000


class Instance:
    """Runs one batch at a time: `run` on its own thread, `run_here` on the caller's."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self.name = name
        self.is_fast = False
        self._model = model
        self._best_us = self._best_wall_us = float("inf")
        self._left = _WINDOW
        self._strikes = 0.0
        self._work: queue.SimpleQueue[tuple[list[InferRequest], Report] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"venturi-{name}", daemon=True)
        self._thread.start()

    def run(self, requests: list[InferRequest], report: Report) -> None:
        """Returns at once; `report(instance, requests, responses or the exception)` follows on the thread."""
        self._work.put((requests, report))

    def run_here(self, requests: list[InferRequest]) -> Outcome:
        """Three slow runs among a few dozen send the model back to its thread."""
        outcome, spent_us = self._execute(requests)
        self._strikes = self._strikes + 1 if spent_us > _SLOW_US else max(self._strikes - _RECOVERY, 0.0)
        if self._strikes >= _MAX_STRIKES:
            self.is_fast, self._strikes = False, 0.0
            self._left = _PENALTY_RUNS
        return outcome

    def close(self) -> None:
        """Ends the thread after the work at hand."""
        self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            requests, report = item
            own = time.thread_time_ns()
            outcome, spent_us = self._execute(requests)
            self._judge((time.thread_time_ns() - own) / 1e3, spent_us)
            report(self, requests, outcome)

    def _judge(self, own_us: float, wall_us: float) -> None:
        """Other threads stretch a run, so the shortest of a window tells what a run takes."""
        self._best_us, self._best_wall_us = min(self._best_us, own_us), min(self._best_wall_us, wall_us)
        self._left -= 1
        if not self._left:
            self.is_fast = self._model.runs_inline and self._best_us < _FAST_US and self._best_wall_us < _FAST_WALL_US
            self._best_us = self._best_wall_us = float("inf")
            self._left = _WINDOW

    def _execute(self, requests: list[InferRequest]) -> tuple[Outcome, float]:
        start = time.perf_counter_ns()
        try:
            outcome: Outcome = self._model.execute(requests)
        except BaseException as exc:
            outcome = exc
        return outcome, (time.perf_counter_ns() - start) / 1e3
