"""Ensembles with decoupled steps: a response for each response, in their order, whatever the steps behind take."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import serving, wait_for
from tests.serve.test_ensembles import add_ensemble, ensemble, port, step
from tests.serve.test_python_models import REPEAT, add_python
from venturi.serve.errors import ServeError, invalid
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.schedulers.ensemble import EnsembleDriver, Plan, Step
from venturi.serve.statistics import ModelStatistics

Submit = Callable[[InferRequest, Callable[[Any], None]], None]


def tensor(name: str, value: int) -> Tensor:
    return Tensor(name, "INT32", np.array([value], np.int32))


def value(given: InferRequest | InferResponse, name: str) -> int:
    tensors = given.inputs if isinstance(given, InferRequest) else given.outputs
    return int(tensors[name].data[0])


def plan(*steps: Step, outputs: tuple[str, ...] = ("out",)) -> Plan:
    return Plan("e", steps, outputs, False)


def one(model: str, reads: str, writes: str, decoupled: bool = False) -> Step:
    return Step(model, "", dict(zip("ab", reads.split())), {"y": writes}, False, decoupled)


class Models:
    """count: so many responses 0, 1, ...; add: a (+ b); fail: an error for 2. Calls end on threads, in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calls: list[str] = []

    def submit(self, request: InferRequest, done: Callable[[Any], None]) -> None:
        self.calls.append(request.model)
        threading.Timer(self.random.random() * 0.01, self.answer, (request, done)).start()

    def answer(self, request: InferRequest, done: Callable[[Any], None]) -> None:
        a = value(request, "a")
        if request.model == "count":
            assert request.emit is not None
            for i in range(a):
                request.emit(InferResponse({"y": tensor("y", i)}))
            done(InferResponse({}))
        elif request.model == "countdown":
            assert request.emit is not None
            for i in range(a - 1):
                request.emit(InferResponse({"y": tensor("y", i)}))
            done(InferResponse({"y": tensor("y", a - 1)}))  # the last one comes with the end
        elif request.model == "fail" and a == 2:
            done(invalid("two"))
        else:
            b = value(request, "b") if "b" in request.inputs else 0
            done(InferResponse({"y": tensor("y", a + b)}))


def run(given: Plan, number: int, submit: Submit) -> tuple[list[InferResponse], Any]:
    """(responses before the last, the last)."""
    driver, over = EnsembleDriver(given, submit, ModelStatistics()), threading.Event()
    found: list[InferResponse] = []
    last: list[Any] = []

    def done(result: Any) -> None:
        last.append(result)
        over.set()

    request = InferRequest("e", "", {"in": tensor("in", number)}, emit=found.append)
    driver.submit(request, done)
    assert over.wait(10)
    assert driver.num_open == 0
    assert len(last) == 1
    return found, last[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("counter", ["count", "countdown"])
def test_responses_keep_their_order(seed: int, counter: str) -> None:
    models = Models(seed)
    found, last = run(
        plan(one(counter, "in", "i", True), one("add", "i", "j"), one("add", "j i", "out")), 6, models.submit
    )
    assert [value(r, "out") for r in found] == [0, 2, 4, 6, 8, 10]
    assert not last.outputs
    assert models.calls.count("add") == 12


@pytest.mark.parametrize("seed", range(10))
def test_what_does_not_depend_on_a_response_runs_once(seed: int) -> None:
    models = Models(seed)
    steps = one("count", "in", "i", True), one("add", "in in", "twice"), one("add", "i twice", "out")
    found, _ = run(plan(*steps, outputs=("out", "twice")), 4, models.submit)
    assert [(value(r, "out"), value(r, "twice")) for r in found] == [(8 + i, 8) for i in range(4)]
    assert models.calls.count("add") == 5


@pytest.mark.parametrize("seed", range(10))
def test_decoupled_behind_decoupled(seed: int) -> None:
    found, _ = run(
        plan(one("count", "in", "i", True), one("count", "i", "j", True), one("add", "j i", "out")), 4,
        Models(seed).submit,
    )  # fmt: skip
    assert [value(r, "out") for r in found] == [i + j for i in range(4) for j in range(i)]


@pytest.mark.parametrize("seed", range(10))
def test_an_error_behind_a_response_ends_it(seed: int) -> None:
    found, last = run(plan(one("count", "in", "i", True), one("fail", "i", "out")), 5, Models(seed).submit)
    assert isinstance(last, ServeError)
    assert "in ensemble 'e', two" in last.message
    assert [value(r, "out") for r in found] == [0, 1][: len(found)]


def test_no_response_and_missing_tensors() -> None:
    steps = one("count", "in", "i", True), one("add", "i", "out")
    assert run(plan(*steps), 0, Models(0).submit)[0] == []

    def silent(request: InferRequest, done: Callable[[Any], None]) -> None:
        if request.model == "count":
            assert request.emit is not None
            request.emit(InferResponse({"y": tensor("y", 1)}))
        done(InferResponse({}))

    _, last = run(plan(*steps), 1, silent)
    assert isinstance(last, ServeError)
    assert "unexpected deadlock" in last.message


def test_cancelling_stops_what_comes_after() -> None:
    held: list[tuple[InferRequest, Any]] = []
    driver = EnsembleDriver(
        plan(one("count", "in", "i", True), one("add", "i", "out")), lambda r, d: held.append((r, d)), ModelStatistics()
    )
    results: list[Any] = []
    request = InferRequest("e", "", {"in": tensor("in", 3)}, emit=results.append)
    driver.submit(request, results.append)
    ((counting, done),) = held
    assert counting.emit is not None
    counting.emit(InferResponse({"y": tensor("y", 0)}))
    driver.cancel(request)
    assert all(r.is_cancelled for r, _ in held)
    counting.emit(InferResponse({"y": tensor("y", 1)}))
    assert [r.model for r, _ in held] == ["count", "add"]
    held[1][1](InferResponse({"y": tensor("y", 0)}))
    assert not results
    done(InferResponse({}))
    assert [r.status.name for r in results] == ["CANCELLED"]
    assert driver.num_open == 0


SQUARE = """
    import random, time
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            time.sleep(random.random() / 50)
            said = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x * x)]) for x in said]
"""
PORTS = {
    "inputs": "input " + port("in", "INT32", "[1]"),
    "outputs": "output " + port("out", "INT32", "[1]"),
    "batch": 0,
}


def test_on_a_server(tmp_path) -> None:
    add_python(tmp_path, "repeat", REPEAT)
    ports = f"input {port('x', 'INT32', '[1]')} output {port('y', 'INT32', '[1]')}"
    add_python(tmp_path, "square", SQUARE, f'backend: "python" {ports} instance_group {{ count: 2 kind: KIND_CPU }}')
    steps = step("repeat", {"count": "in"}, {"index": "i"}) + step("square", {"x": "i"}, {"y": "out"})
    add_ensemble(tmp_path, "squares", ensemble(steps, **PORTS))
    with serving(tmp_path) as server, grpc_client.InferenceServerClient(server.url("grpc")) as client:
        assert client.get_model_config("squares").config.model_transaction_policy.decoupled
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        given = grpc_client.InferInput("in", [1], "INT32").set_data_from_numpy(np.array([7], np.int32))
        client.async_stream_infer("squares", [given], enable_empty_final_response=True)
        found = [answers.get(timeout=20) for _ in range(8)]
        assert not any(error for _, error in found)
        assert [int(r.as_numpy("out")[0]) for r, _ in found[:7]] == [i * i for i in range(7)]
        assert found[7][0].get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
        x = http_client.InferInput("in", [1], "INT32").set_data_from_numpy(np.array([1], np.int32))
        http = http_client.InferenceServerClient(server.url("http"))
        with pytest.raises(InferenceServerException, match="decoupled"):
            http.infer("squares", [x])
        http.close()
        driver = server.running.core.repository.find("squares").driver
        wait_for(lambda: driver.num_open == 0)
