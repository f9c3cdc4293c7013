"""Triton's Python models: `model.py` in worker processes, one an instance, started again when they die."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from tritonclient.grpc import model_config_pb2 as pb

from venturi.core.log import logger
from venturi.serve.config import ModelConfig, message_json
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.models.base import Answer
from venturi.serve.python.calls import Submit, answer_call
from venturi.serve.python.wire import Channel, Closed, Head, grouped
from venturi.serve.request import InferRequest, InferResponse, Tensor

_STOP_S = 10.0
_LEVELS = {"info": logger.info, "warning": logger.warning, "error": logger.error, "verbose": logger.debug}


class PythonKind:
    """`submit` is how a model's own requests to other models are made."""

    name = "python"

    def __init__(self, submit: Submit) -> None:
        self._submit = submit

    def complete(self, config: ModelConfig, folder: Path | None, default_max_batch: int) -> None:
        if folder is None:
            return
        worker = Worker(config.name, _file(config, folder), self._submit)
        try:
            worker.ask({"op": "import", "file": str(worker.file)})
            done, _ = worker.ask({"op": "complete", "config": _plain(config)})
        finally:
            worker.stop()
        try:
            completed = ParseDict(done["config"], pb.ModelConfig())
        except ParseError as exc:
            raise invalid(
                f"auto_complete_config of model '{config.name}' says what is no configuration: {exc}"
            ) from exc
        config.CopyFrom(completed)

    def load(self, config: ModelConfig, folder: Path) -> PythonModel:
        return PythonModel(config, _file(config, folder), self._submit)


class PythonModel:
    """As many workers as instances; a batch takes one that is free."""

    runs_inline = False

    def __init__(self, config: ModelConfig, file: Path, submit: Submit) -> None:
        self._config, self._file, self._submit = config, file, submit
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        names = [f"{g.name}_{i}" for g in config.instance_group for i in range(g.count)]
        try:
            for name in names:
                self._free.put(self._start(name))
        except BaseException:
            self.close()
            raise

    def execute(self, requests: list[InferRequest]) -> Sequence[Answer]:
        worker = self._free.get()
        try:
            if worker.is_dead:
                worker.stop()
                worker = self._start(worker.name)
            return worker.execute(requests)
        finally:
            self._free.put(worker)

    def inspect(self) -> dict[str, Any]:
        return {"reason": "a Python model, in worker processes"}

    def close(self) -> None:
        while not self._free.empty():
            self._free.get().stop()

    def _start(self, name: str) -> Worker:
        worker = Worker(name, self._file, self._submit)
        args = {
            "model_config": _text(self._config), "model_name": self._config.name, "model_instance_name": name,
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
            "model_repository": str(self._file.parent.parent), "model_version": self._file.parent.name,
        }  # fmt: skip
        try:
            worker.ask({"op": "import", "file": str(self._file)})
            worker.ask({"op": "initialize", "args": args})
        except ServeError:
            worker.stop()
            raise
        return worker


class Worker:
    """One process and the thread that listens to it."""

    def __init__(self, name: str, file: Path, submit: Submit) -> None:
        self.name, self.file, self.is_dead = name, file, False
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
        for request in requests:
            t = request.times
            t.compute = t.input_done = t.output = t.end = started
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
        answers = [_answer(r, own) for r, own in zip(done["responses"], grouped(outputs, counts))]
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
        elif op == "log":
            _LEVELS.get(head["level"], logger.info)("model %s: %s", self.name, head["message"])

    def _respond(self, head: Head, tensors: list[Tensor]) -> None:
        with self._lock:
            key = head["key"]
            request = self._open.pop(key, None) if head["final"] else self._open.get(key)
        if request is None:
            return
        answer = _answer(head["response"], tensors) or InferResponse({})
        if head["final"] or isinstance(answer, ServeError):
            assert request.finish is not None, "requests come through a scheduler"
            request.finish(answer)
        elif request.emit is not None:
            request.emit(answer)
            if request.is_cancelled:
                self._channel.send({"op": "cancel", "key": key})
        else:
            request.finish and request.finish(answer)

    def _give_up(self) -> None:
        self._process.wait()
        with self._lock:
            self.is_dead = True
            waiting, self._waiting = list(self._waiting.values()), {}
            left, self._open = list(self._open.values()), {}
        error = self._death()
        for answer in waiting:
            answer.put(({"error": error.message}, []))
        for request in left:
            if request.finish is not None:
                request.finish(error)

    def _death(self) -> ServeError:
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ServeError(Status.INTERNAL, f"the worker process of '{self.name}' died ({how})")


def _file(config: ModelConfig, folder: Path) -> Path:
    name = config.default_model_filename or "model.py"
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise invalid(f"default_model_filename {name!r} of model {config.name} leaves its version folder")
    if not path.is_file():
        raise ServeError(Status.NOT_FOUND, f"no model file in {folder}: expected {name}")
    return path


def _plain(config: ModelConfig) -> Head:
    return message_json(config)


def _text(config: ModelConfig) -> str:
    import orjson

    return orjson.dumps(_plain(config)).decode()


def _described(request: InferRequest, key: int) -> Mapping[str, Any]:
    return {
        "key": key, "id": request.id, "correlation": request.sequence, "model": request.model,
        "version": int(request.version or -1), "outputs": [o.name for o in request.outputs],
        "flags": request.sequence_start | request.sequence_end << 1, "timeout": request.timeout_us,
        "parameters": dict(request.parameters), "num_inputs": len(request.inputs),
    }  # fmt: skip


def _answer(head: Head | None, outputs: list[Tensor]) -> Answer:
    if head is None:
        return None
    if "error" in head:
        code = head["code"] if head["code"] in Status.__members__ else "INTERNAL"
        return ServeError(Status[code], head["error"])
    return InferResponse({t.name: t for t in outputs}, head["parameters"])
