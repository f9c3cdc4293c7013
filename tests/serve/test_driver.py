"""The driver under load: a bound on open requests, answers that come late or twice."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from venturi.serve.errors import ServeError, Status
from venturi.serve.instance import Instance
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.schedulers.batcher import OneByOne
from venturi.serve.schedulers.driver import Driver
from venturi.serve.statistics import ModelStatistics


class Gated:
    """Runs when it is let; answers nothing, so that its requests are finished from outside."""

    runs_inline = False

    def __init__(self, late: bool = False) -> None:
        self.gate, self.late = threading.Event(), late

    def execute(self, requests: list[InferRequest]) -> list[Any]:
        assert self.gate.wait(20)
        return [None if self.late else InferResponse({}) for _ in requests]


def request() -> InferRequest:
    return InferRequest("m", "", {"x": Tensor("x", "FP32", np.zeros((1, 1), np.float32))})


def test_open_requests_are_bounded() -> None:
    model, answers = Gated(), []
    driver = Driver(OneByOne(), [Instance("i", model)], ModelStatistics(), max_open=3)
    for _ in range(3):
        driver.submit(request(), answers.append)
    with pytest.raises(ServeError, match="Exceeds maximum queue size: 3") as refused:
        driver.submit(request(), answers.append)
    assert refused.value.status == Status.UNAVAILABLE
    model.gate.set()
    while len(answers) < 3:
        threading.Event().wait(0.005)
    assert driver.num_open == 0
    driver.submit(request(), answers.append)


def test_late_answers_count_once() -> None:
    model, answers, statistics = Gated(late=True), [], ModelStatistics()
    driver = Driver(OneByOne(), [Instance("i", model)], statistics)
    one = request()
    driver.submit(one, answers.append)
    assert one.finish is not None
    model.gate.set()
    one.finish(InferResponse({}, {"first": True}))
    one.finish(InferResponse({}, {"second": True}))
    one.finish(ServeError(Status.INTERNAL, "third"))
    assert [a.parameters for a in answers] == [{"first": True}]
    assert (statistics.success.count, statistics.fail.count, driver.num_open) == (1, 0, 0)


def test_answers_keep_their_order_across_threads() -> None:
    model, seen = Gated(late=True), []
    model.gate.set()
    driver = Driver(OneByOne(), [Instance(str(i), model) for i in range(4)], ModelStatistics(), preserve_order=True)
    requests = [request() for _ in range(200)]
    for i, one in enumerate(requests):
        driver.submit(one, lambda answer, i=i: seen.append(i))

    def finish(part: list[InferRequest]) -> None:
        for one in part:
            assert one.finish is not None
            one.finish(InferResponse({}))

    threads = [threading.Thread(target=finish, args=(requests[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while len(seen) < 200:
        threading.Event().wait(0.005)
    assert seen == list(range(200))
