"""The process that runs one instance of a `model.py`: `python -m venturi.serve.python.worker FD`.

The main thread runs the model, another reads from the server, so that a model that waits for its call to another model
still hears the answer. Ends when the server closes the socket.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from venturi.serve.python import pb_utils
from venturi.serve.python.wire import Channel, Closed, Head, grouped
from venturi.serve.request import Tensor

Frame = tuple[Head, list[Tensor]]


class Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._work: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._calls: dict[int, queue.SimpleQueue[Frame]] = {}
        self._numbers = itertools.count(1)
        self._open: dict[int, pb_utils.InferenceRequest] = {}
        self._model: Any = None
        self._class: Any = None
        pb_utils.InferenceRequest.caller = self._call
        pb_utils.MetricFamily.asked = self._metric
        pb_utils.MetricFamily.told = self._tell
        pb_utils.Logger.sink = lambda level, text: self._channel.send({"op": "log", "level": level, "message": text})

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            head, tensors = self._work.get()
            try:
                answer = getattr(self, "_" + head["op"])(head, tensors)
            except Exception as exc:
                answer = {"error": f"{type(exc).__name__}: {exc}"}, []
            self._channel.send({"op": "done", "id": head["id"]} | answer[0], answer[1])
            if head["op"] == "finalize":
                return

    def _read(self) -> None:
        try:
            while True:
                head, tensors = self._channel.receive()
                if head["op"] == "result":
                    self._calls[head["call"]].put((head, tensors))
                elif head["op"] == "cancel":
                    request = self._open.get(head["key"])
                    if request is not None:
                        request._cancelled.set()
                        request.get_response_sender().window.lift()
                elif head["op"] == "more":
                    request = self._open.get(head["key"])
                    if request is not None:
                        request.get_response_sender().window.give(head["count"])
                else:
                    self._work.put((head, tensors))
        except Closed:
            os._exit(0)

    def _import(self, head: Head, tensors: list[Tensor]) -> tuple[Head, list[Tensor]]:
        path = Path(head["file"])
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location("model", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["model"] = module
        spec.loader.exec_module(module)
        self._class = getattr(module, "TritonPythonModel", None)
        if self._class is None:
            raise pb_utils.TritonModelException(f"{path} has no class TritonPythonModel")
        return {}, []

    def _complete(self, head: Head, tensors: list[Tensor]) -> tuple[Head, list[Tensor]]:
        config = pb_utils.ModelConfig(head["config"])
        if hasattr(self._class, "auto_complete_config"):
            config = self._class.auto_complete_config(config) or config
        return {"config": config.as_dict()}, []

    def _initialize(self, head: Head, tensors: list[Tensor]) -> tuple[Head, list[Tensor]]:
        self._model = self._class()
        if hasattr(self._model, "initialize"):
            self._model.initialize(head["args"])
        return {}, []

    def _finalize(self, head: Head, tensors: list[Tensor]) -> tuple[Head, list[Tensor]]:
        if hasattr(self._model, "finalize"):
            self._model.finalize()
        return {}, []

    def _execute(self, head: Head, tensors: list[Tensor]) -> tuple[Head, list[Tensor]]:
        parts = grouped(tensors, [r["num_inputs"] for r in head["requests"]])
        requests = [self._request(given, own) for given, own in zip(head["requests"], parts)]
        try:
            responses = _answers_of(requests, self._model.execute(requests))
        except BaseException:
            for request in requests:
                request.get_response_sender()._is_over = True
            raise
        keys = [given["key"] for given in head["requests"]]
        described: list[Head | None] = []
        outputs: list[Tensor] = []
        for key, request, response in zip(keys, requests, responses):
            if _runs_again(request):
                described.append({"again": True, "num_outputs": 0})
            elif response is None:
                described.append(None)
                continue
            request.get_response_sender()._is_over = True
            self._open.pop(key, None)
            if response is not None:
                one, own = _described(response)
                described.append(one)
                outputs += own
        return {"responses": described}, outputs

    def _request(self, given: Head, inputs: list[Tensor]) -> pb_utils.InferenceRequest:
        request = pb_utils.InferenceRequest(
            given["id"], given["correlation"], [pb_utils.Tensor(t.name, t.data) for t in inputs], given["outputs"],
            given["model"], given["version"], given["flags"], given["timeout"], parameters=given["parameters"],
        )  # fmt: skip
        key = given["key"]

        def send(response: pb_utils.InferenceResponse | None, final: bool) -> None:
            head, outputs = _described(response) if response is not None else (None, [])
            if final:
                self._open.pop(key, None)
            self._channel.send({"op": "response", "key": key, "response": head, "final": final}, outputs)

        self._open[key] = request
        request._sender = pb_utils.ResponseSender(send, request, pb_utils.Window(given["window"]))
        return request

    def _call(self, request: pb_utils.InferenceRequest, decoupled: bool) -> Iterator[pb_utils.InferenceResponse]:
        """A request to another model of the server."""
        number = next(self._numbers)
        answers = self._calls[number] = queue.SimpleQueue()
        head = {
            "op": "call", "call": number, "model": request.model_name, "version": request.model_version,
            "id": request.request_id(), "correlation": request.correlation_id(), "flags": request.flags(),
            "outputs": request.requested_output_names(), "parameters": json.loads(request.parameters()),
            "timeout": request.timeout(), "decoupled": decoupled,
        }  # fmt: skip
        self._channel.send(head, [pb_utils.wire_tensor(t) for t in request.inputs()])
        return self._answers(number, answers)

    def _tell(self, head: Head) -> None:
        with contextlib.suppress(Closed):  # the server is gone, and its metrics
            self._channel.send({"op": "metric"} | head)

    def _metric(self, head: Head) -> float:
        """The server's answer to what a metric wants."""
        number = next(self._numbers)
        answers = self._calls[number] = queue.SimpleQueue()
        self._channel.send({"op": "metric", "call": number} | head)
        answer, _ = answers.get()
        del self._calls[number]
        if answer.get("error"):
            raise pb_utils.TritonModelException(answer["error"])
        return float(answer["value"])

    def _answers(self, number: int, answers: queue.SimpleQueue[Frame]) -> Iterator[pb_utils.InferenceResponse]:
        while True:
            head, tensors = answers.get()
            if head.get("error"):
                error = pb_utils.TritonError(head["error"], head["code"])
                yield pb_utils.InferenceResponse(error=error)
            elif tensors or not head["final"]:
                outputs = [pb_utils.Tensor(t.name, t.data) for t in tensors]
                yield pb_utils.InferenceResponse(outputs, parameters=head["parameters"])
            if head["final"]:
                del self._calls[number]
                return


def _runs_again(request: pb_utils.InferenceRequest) -> bool:
    return request._release == pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE


def _answers_of(requests: list[pb_utils.InferenceRequest], responses: Any) -> list[Any]:
    """What `execute` returned, an entry a request."""
    if responses is None:
        return [None] * len(requests)
    if not isinstance(responses, list | tuple) or len(responses) != len(requests):
        got = len(responses) if isinstance(responses, list | tuple) else type(responses).__name__
        raise pb_utils.TritonModelException(f"execute must return a list of {len(requests)} responses, got {got}")
    if any(_runs_again(q) and r is not None for q, r in zip(requests, responses)):
        raise pb_utils.TritonModelException("a rescheduled request must have None among the responses")
    return list(responses)


def _described(response: pb_utils.InferenceResponse) -> tuple[Head, list[Tensor]]:
    error = response.error()
    if error is not None:
        code, text = (error.code(), error.message()) if hasattr(error, "code") else ("INTERNAL", str(error))
        return {"error": text, "code": code, "num_outputs": 0}, []
    outputs = [pb_utils.wire_tensor(t) for t in response.output_tensors()]
    return {"num_outputs": len(outputs), "parameters": json.loads(response.parameters())}, outputs


def main() -> None:
    sys.modules["triton_python_backend_utils"] = pb_utils
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(Closed):  # the server is gone; so is the reason to run
        Worker(channel).run()
    os._exit(0)


if __name__ == "__main__":
    main()
