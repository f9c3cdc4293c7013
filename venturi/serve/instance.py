"""One copy of a model with a thread of its own: takes a batch, reports back to the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

from venturi.serve.models.base import LoadedModel
from venturi.serve.request import InferRequest, InferResponse

Report = Callable[["Instance", list[InferRequest], "list[InferResponse] | BaseException"], None]


class Instance:
    """`run` returns at once; `report` is called on the event loop when the batch is done or has failed."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self.name = name
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[tuple[list[InferRequest], Report] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"venturi-{name}", daemon=True)
        self._thread.start()

    def run(self, requests: list[InferRequest], report: Report) -> None:
        self._work.put((requests, report))

    def close(self) -> None:
        """Ends the thread after the work at hand."""
        self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            requests, report = item
            result: Any
            try:
                result = self._model.execute(requests)
            except BaseException as exc:
                result = exc
            self._loop.call_soon_threadsafe(report, self, requests, result)
