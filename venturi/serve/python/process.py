"""A worker process and the thread that listens to it, as the server sees them."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from venturi.core.log import logger
from venturi.serve.custom_metrics import CustomMetrics, Share
from venturi.serve.errors import ServeError, Status
from venturi.serve.models.base import Answer, Later
from venturi.serve.python.calls import Submit, answer_call
from venturi.serve.python.wire import Channel, Closed, Head, grouped
from venturi.serve.request import InferRequest, InferResponse, Tensor

_STOP_S = 10.0
_LEVELS = {"info": logger.info, "warning": logger.warning, "error": logger.error, "verbose": logger.debug}


class Worker:
    """One instance of a model. `execute` from one thread at a time."""

    def __init__(self, name: str, file: Path, submit: Submit, metrics: CustomMetrics) -> None:
        self.name, self.file, self.is_dead = name, file, False
        self._share = Share(metrics)
        self._submit = submit
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[tuple[Head, list[Tensor]]]] = {}
        self._open: dict[int, InferRequest] = {}
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "venturi.serve.python.worker", str(theirs.fileno())]
        root = str(Path(__file__).resolve().parents[3])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=2, env=environment)
        theirs.close()
        self._channel = Channel(ours)
        self._reader = threading.Thread(target=self._read, name=f"venturi-{name}-reader", daemon=True)
        self._reader.start()

    def ask(
        self, head: Head, tensors: Sequence[Tensor] = (), timeout_s: float | None = None
    ) -> tuple[Head, list[Tensor]]:
        """The worker's answer. Raises ServeError when the model fails, the process dies or the time is over."""
        number = next(self._numbers)
        answer: queue.SimpleQueue[tuple[Head, list[Tensor]]] = queue.SimpleQueue()
        with self._lock:
            if self.is_dead:
                raise self._death()
            self._waiting[number] = answer
        try:
            self._channel.send(head | {"id": number}, tensors)
        except Closed:
            self._process.wait()
            raise self._death() from None
        try:
            done, outputs = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise ServeError(Status.INTERNAL, f"{head['op']} takes longer than {timeout_s:g} s") from None
        if "error" in done:
            raise ServeError(Status.INTERNAL, done["error"])
        return done, outputs

    def execute(self, requests: list[InferRequest]) -> Sequence[Answer]:
        started = time.perf_counter_ns()
        keys = [next(self._numbers) for _ in requests]
        with self._lock:
            self._open.update(zip(keys, requests))
        for request, key in zip(requests, keys):
            t = request.times
            t.compute = t.input_done = t.output = t.end = started
            if request.window:
                request.resume = partial(self._resume, key)
        tensors = [t for r in requests for t in r.inputs.values()]
        head = {"op": "execute", "requests": [_described(r, k) for r, k in zip(requests, keys)]}
        try:
            done, outputs = self.ask(head, tensors)
        except ServeError:
            with self._lock:
                for key in keys:
                    self._open.pop(key, None)
            raise
        answered = time.perf_counter_ns()
        for request in requests:
            request.times.output = request.times.end = answered
        counts = [0 if r is None else r["num_outputs"] for r in done["responses"]]
        answers = [_outcome(r, own) for r, own in zip(done["responses"], grouped(outputs, counts))]
        with self._lock:
            for key, answer in zip(keys, answers):
                if answer is not None:
                    self._open.pop(key, None)
        return answers

    def stop(self) -> None:
        """Lets the model finalize, then ends the process."""
        if not self.is_dead:
            try:
                self.ask({"op": "finalize"}, timeout_s=_STOP_S)
            except ServeError as exc:
                logger.error("model %s: finalize failed: %s", self.name, exc)
        self._channel.close()
        self._end_process()

    def _end_process(self) -> None:
        """It ends by itself when the channel is closed, unless it hangs."""
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        try:
            while True:
                self._hear(*self._channel.receive())
        except Closed:
            pass  # the process ended, or `stop` closed the channel
        finally:
            self._give_up()

    def _hear(self, head: Head, tensors: list[Tensor]) -> None:
        op = head["op"]
        if op == "done":
            with self._lock:
                waiting = self._waiting.pop(head["id"], None)
            if waiting is not None:
                waiting.put((head, tensors))
        elif op == "response":
            self._respond(head, tensors)
        elif op == "call":
            answer_call(self._submit, self._channel, head, tensors)
        elif op == "metric":
            self._measure(head)
        elif op == "log":
            _LEVELS.get(head["level"], logger.info)("model %s: %s", self.name, head["message"])

    def _measure(self, head: Head) -> None:
        """A metric of the model's own; what has a number is answered."""
        try:
            answer: Head = {"value": self._share.do(head)}
        except ServeError as exc:
            answer = {"error": exc.message}
        if "call" in head:
            with contextlib.suppress(Closed):  # the process that asked has died
                self._channel.send({"op": "result", "call": head["call"]} | answer)

    def _respond(self, head: Head, tensors: list[Tensor]) -> None:
        with self._lock:
            key = head["key"]
            request = self._open.pop(key, None) if head["final"] else self._open.get(key)
        if request is None:
            return
        answer = _answer(head["response"], tensors) or InferResponse({})
        if head["final"] or isinstance(answer, ServeError):
            assert request.finish is not None, "requests come through a scheduler"
            request.finish(request, answer)
        elif request.emit is not None:
            request.emit(answer)
            if request.is_cancelled:
                self._channel.send({"op": "cancel", "key": key})
        elif request.finish is not None:
            request.finish(request, answer)

    def _resume(self, key: int, count: int) -> None:
        """The model may send so many more responses to this request."""
        with contextlib.suppress(Closed):  # the process has died, and its requests are answered
            self._channel.send({"op": "more", "key": key, "count": count})

    def _give_up(self) -> None:
        self._channel.close()
        self._end_process()
        self._share.close()
        with self._lock:
            self.is_dead = True
            waiting, self._waiting = list(self._waiting.values()), {}
            left, self._open = list(self._open.values()), {}
        error = self._death()
        for answer in waiting:
            answer.put(({"error": error.message}, []))
        for request in left:
            if request.finish is not None:
                request.finish(request, error)

    def _death(self) -> ServeError:
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ServeError(Status.INTERNAL, f"the worker process of '{self.name}' died ({how})")


def _described(request: InferRequest, key: int) -> Mapping[str, Any]:
    return {
        "key": key, "id": request.id, "correlation": request.sequence, "model": request.model,
        "version": int(request.version or -1), "outputs": [o.name for o in request.outputs],
        "flags": request.sequence_start | request.sequence_end << 1, "timeout": request.timeout_us,
        "parameters": dict(request.parameters), "num_inputs": len(request.inputs), "window": request.window,
    }  # fmt: skip


def _outcome(head: Head | None, outputs: list[Tensor]) -> Answer:
    """Of a request in `execute`."""
    return Later.RESCHEDULE if head is not None and head.get("again") else _answer(head, outputs)


def _answer(head: Head | None, outputs: list[Tensor]) -> InferResponse | ServeError | None:
    if head is None:
        return None
    if "error" in head:
        code = head["code"] if head["code"] in Status.__members__ else "INTERNAL"
        return ServeError(Status[code], head["error"])
    return InferResponse({t.name: t for t in outputs}, head["parameters"])
