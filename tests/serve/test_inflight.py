"""`max_inflight_requests`: a decoupled step waits while so many of its responses are on their way."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client

from tests.serve.running import serving
from tests.serve.test_decoupled_ensembles import one, tensor, value
from tests.serve.test_ensembles import add_ensemble, ensemble, port, step
from tests.serve.test_python_models import add_python
from venturi.serve.errors import ServeError, invalid
from venturi.serve.python.pb_utils import Window
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.schedulers.ensemble import EnsembleDriver, Plan
from venturi.serve.statistics import ModelStatistics

PRODUCER = """
    import time
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                count = int(pb_utils.get_input_tensor_by_name(request, "count").as_numpy()[0])
                for i in range(count):
                    now = np.array([time.monotonic()])
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("made", now)]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
"""
CONSUMER = """
    import time
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            answers = []
            for request in requests:
                made = pb_utils.get_input_tensor_by_name(request, "made").as_numpy()
                time.sleep(0.03)
                both = np.array([made[0], time.monotonic()])
                answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("both", both)]))
            return answers
"""


class Models:
    """count: keeps to its window. slow: takes a while, on threads; fails for `bad`. Notes how many run at once."""

    def __init__(self, bad: int = -1) -> None:
        self.bad, self.now, self.most, self.sent = bad, 0, 0, 0
        self.lock = threading.Lock()

    def submit(self, request: InferRequest, done: Any) -> None:
        target = self.count if request.model == "count" else self.slow
        threading.Thread(target=target, args=(request, done), daemon=True).start()

    def count(self, request: InferRequest, done: Any) -> None:
        window = Window(request.window)
        request.resume = window.give
        for i in range(value(request, "a")):
            window.take()
            self.sent += 1
            assert request.emit is not None
            request.emit(InferResponse({"y": tensor("y", i)}))
        done(InferResponse({}))

    def slow(self, request: InferRequest, done: Any) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self.lock:
            self.now -= 1
        a = value(request, "a")
        done(invalid("bad") if a == self.bad else InferResponse({"y": tensor("y", a)}))


def run(models: Models, limit: int, *, number: int = 20, outputs: tuple[str, ...] = ("out",)) -> tuple[list[int], Any]:
    driver = EnsembleDriver(
        Plan("e", (one("count", "in", "i", True), one("slow", "i", "out")), outputs, False, limit),
        models.submit, ModelStatistics(),
    )  # fmt: skip
    found: list[InferResponse] = []
    last: list[Any] = []
    over = threading.Event()
    request = InferRequest("e", "", {"in": tensor("in", number)}, emit=found.append)
    driver.submit(request, lambda result: (last.append(result), over.set()))
    assert over.wait(20)
    assert driver.num_open == 0
    return [value(r, "out") for r in found], last[0]


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_are_under_way_than_allowed(limit: int) -> None:
    models = Models()
    found, last = run(models, limit)
    assert found == list(range(20))
    assert isinstance(last, InferResponse)
    assert models.most <= limit


def test_without_a_limit_all_are() -> None:
    models = Models()
    assert run(models, 0)[0] == list(range(20))
    assert models.most > 3


@pytest.mark.parametrize("limit", [1, 3])
def test_a_failure_behind_lets_the_producer_end(limit: int) -> None:
    models = Models(bad=4)
    found, last = run(models, limit)
    assert isinstance(last, ServeError)
    assert found == list(range(len(found)))
    assert len(found) <= 4
    assert models.sent == 20


def test_an_output_that_never_comes_lets_the_producer_end() -> None:
    models = Models()
    _, last = run(models, 1, outputs=("out", "nobody"))
    assert isinstance(last, ServeError)
    assert "nobody" in last.message
    assert models.sent == 20


def test_a_window() -> None:
    window, passed = Window(2), []

    def take(count: int) -> None:
        for i in range(count):
            window.take()
            passed.append(i)

    taker = threading.Thread(target=take, args=(9,), daemon=True)
    taker.start()
    taker.join(0.1)
    assert len(passed) == 2
    window.give(3)
    taker.join(0.1)
    assert len(passed) == 5
    window.lift()
    taker.join(10)
    assert len(passed) == 9
    free = Window(0)
    for _ in range(1000):
        free.take()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("inflight")
    decoupled = "model_transaction_policy { decoupled: true }"
    add_python(
        root,
        "producer",
        PRODUCER,
        f'backend: "python" {decoupled} input {port("count", "INT32", "[1]")} output {port("made", "FP64", "[1]")}',
    )
    add_python(
        root,
        "consumer",
        CONSUMER,
        f'backend: "python" input {port("made", "FP64", "[1]")} output {port("both", "FP64", "[2]")}',
    )
    steps = step("producer", {"count": "in"}, {"made": "m"}) + step("consumer", {"made": "m"}, {"both": "out"})
    ends = f"input {port('in', 'INT32', '[1]')}", f"output {port('out', 'FP64', '[2]')}"
    add_ensemble(root, "free", ensemble(steps, *ends, batch=0))
    add_ensemble(root, "limited", ensemble(steps + "max_inflight_requests: 2", *ends, batch=0))
    with serving(root) as running:
        yield running


def times(server, model: str, count: int = 10) -> np.ndarray:
    """[count, 2]: when the producer began to send a response, when the consumer was done with it."""
    found: list[Any] = []
    over = threading.Event()

    def callback(result: Any, error: Any) -> None:
        assert error is None, error
        if result.get_response().parameters["triton_final_response"].bool_param:
            over.set()
        if result.as_numpy("out") is not None:
            found.append(result.as_numpy("out"))

    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(callback)
        given = grpc_client.InferInput("in", [1], "INT32")
        given.set_data_from_numpy(np.array([count], np.int32))
        client.async_stream_infer(model, [given], enable_empty_final_response=True)
        assert over.wait(30)
        client.stop_stream()
    return np.stack(found)


def test_a_python_model_waits_in_send(server) -> None:
    """Its clock is read before each `send`: the fourth can be read once the first of a window of two is over."""
    made, done = times(server, "limited").T
    assert len(made) == 10
    assert (made[3:] >= done[:-3]).all()
    made, done = times(server, "free").T
    assert made[-1] < done[2], "without a limit the producer does not wait"
