"""The driver and its instances: batches, failures, timeouts, order, draining; no request is lost or answered twice."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import Any

import numpy as np
import pytest

from tests.serve.running import wait_for
from venturi.serve import instance as instance_module
from venturi.serve.errors import ServeError, Status
from venturi.serve.instance import Instance
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher, OneByOne
from venturi.serve.schedulers.driver import Driver
from venturi.serve.schedulers.queues import QueuePolicy, WaitingLine
from venturi.serve.served import ServedVersion
from venturi.serve.statistics import ModelStatistics

X = np.ones((1, 4), np.float32)


class Slow:
    """A model that waits for `gate`, then answers with its batch's size; `fails` makes it raise."""

    def __init__(self, fails=False):
        self.gate = threading.Event()
        self.fails = fails
        self.batches = []
        self.closed = False

    runs_inline = True

    def execute(self, requests):
        assert self.gate.wait(20)
        self.batches.append(requests)
        if self.fails:
            raise RuntimeError("the model is broken")
        for r in requests:
            r.times.end = time.perf_counter_ns()
        return [InferResponse({"n": Tensor("n", "INT32", np.array([len(requests)], np.int32))}) for _ in requests]

    def close(self):
        self.closed = True


def request(name="r"):
    return InferRequest("m", "", {"x": Tensor("x", "FP32", X)}, id=name)


class Loop(Driver):
    """A driver whose answers are futures of the running loop, as ServedVersion gives them."""

    def ask(self, asked):
        version = ServedVersion.__new__(ServedVersion)
        version.driver = self
        version.submit = self.submit
        return version.infer(asked)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 30))


def test_requests_that_wait_run_together_and_each_gets_its_answer():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        driver = Loop(DynamicBatcher(BatchingRules(8)), [Instance("i", model)], statistics)
        answers = [driver.ask(request(str(i))) for i in range(6)]
        wait_for(lambda: statistics.pending == 5)
        model.gate.set()
        sizes = [int((await a).outputs["n"].data[0]) for a in answers]
        assert sizes == [1, 5, 5, 5, 5, 5]
        assert (statistics.executions, statistics.pending, driver.num_open) == (2, 0, 0)
        await driver.drain()

    run(main())


def test_a_failing_model_fails_its_batch_and_serves_on():
    async def main():
        model = Slow(fails=True)
        model.gate.set()
        statistics = ModelStatistics()
        driver = Loop(OneByOne(), [Instance("i", model)], statistics)
        with pytest.raises(ServeError, match=r"\[request id: a\] RuntimeError: the model is broken"):
            await driver.ask(request("a"))
        model.fails = False
        assert (await driver.ask(request("b"))).outputs
        assert statistics.failures["BACKEND"] == 1
        await driver.drain()

    run(main())


def test_timeouts_answer_while_the_instance_is_busy():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        line = WaitingLine(default=QueuePolicy(timeout_us=20_000))
        driver = Loop(OneByOne(line), [Instance("i", model)], statistics)
        first, second = driver.ask(request()), driver.ask(request())
        start = time.perf_counter()
        with pytest.raises(ServeError, match="Request timeout expired"):
            await second
        assert time.perf_counter() - start < 5
        model.gate.set()
        await first
        assert statistics.failures["REJECTED"] == 1
        assert len(model.batches) == 1
        await driver.drain()

    run(main())


def test_an_abandoned_request_never_runs():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        driver = Loop(OneByOne(), [Instance("i", model)], statistics)
        first, second, third = (driver.ask(request(n)) for n in "abc")
        second.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(first, third)
        assert [b[0].id for b in model.batches] == ["a", "c"]
        assert statistics.failures["CANCELED"] == 1
        await driver.drain()

    run(main())


def test_order_is_preserved_over_instances():
    async def main():
        slow, fast = Slow(), Slow()
        fast.gate.set()
        driver = Loop(OneByOne(), [Instance("s", slow), Instance("f", fast)], ModelStatistics(), preserve_order=True)
        order = []
        answers = []
        for i in range(4):
            answers.append(driver.ask(request(str(i))))
            answers[-1].add_done_callback(lambda done, i=i: order.append(i))
        await asyncio.sleep(0.05)
        assert order == []
        slow.gate.set()
        await asyncio.gather(*answers)
        assert order == [0, 1, 2, 3]
        await driver.drain()

    run(main())


def test_draining_answers_what_was_accepted_and_refuses_the_rest():
    async def main():
        model = Slow()
        driver = Loop(OneByOne(), [Instance("i", model)], ModelStatistics())
        answers = [driver.ask(request(str(i))) for i in range(3)]
        draining = asyncio.ensure_future(driver.drain())
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="being unloaded"):
            driver.ask(request())
        model.gate.set()
        await draining
        assert all(a.done() and not a.exception() for a in answers)

    run(main())


def test_giving_up_on_a_stuck_model_ends_the_loop():
    model = Slow()

    async def main():
        driver = Loop(OneByOne(), [Instance("i", model)], ModelStatistics())
        driver.ask(request())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(driver.drain(), 0.1)

    start = time.perf_counter()
    run(main())
    assert time.perf_counter() - start < 5
    model.gate.set()


class Gated:
    """Runs when it is let; answers nothing, so that its requests are finished from outside."""

    runs_inline = False

    def __init__(self, late: bool = False) -> None:
        self.gate, self.late = threading.Event(), late

    def execute(self, requests: list[InferRequest]) -> list[Any]:
        assert self.gate.wait(20)
        return [None if self.late else InferResponse({}) for _ in requests]


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
    one.finish(one, InferResponse({}, {"first": True}))
    one.finish(one, InferResponse({}, {"second": True}))
    one.finish(one, ServeError(Status.INTERNAL, "third"))
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
            one.finish(one, InferResponse({}))

    threads = [threading.Thread(target=finish, args=(requests[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while len(seen) < 200:
        threading.Event().wait(0.005)
    assert seen == list(range(200))


class Clock:
    """Stands for the time module; a run takes `run_us` of wall time and as much of its thread's."""

    def __init__(self):
        self.now, self.run_us = 0, 10

    def perf_counter_ns(self):
        return self.now

    def thread_time_ns(self):
        return self.now

    runs_inline = True

    def execute(self, requests):
        self.now += self.run_us * 1000
        return []

    def close(self):
        return


def test_fast_models_run_where_the_request_is_until_they_are_slow(monkeypatch):
    clock, reports = Clock(), queue.SimpleQueue()
    monkeypatch.setattr(instance_module, "time", clock)
    instance = Instance("i", clock)

    def on_its_thread(times):
        for _ in range(times):
            instance.run([], lambda *report: reports.put(report))
            reports.get(timeout=20)

    on_its_thread(19)
    assert not instance.is_fast
    on_its_thread(1)
    assert instance.is_fast
    clock.run_us = 5000
    for fast in (True, True, False):
        instance.run_here([])
        assert instance.is_fast is fast
    clock.run_us = 10
    on_its_thread(999)
    assert not instance.is_fast
    on_its_thread(1)
    assert instance.is_fast
    instance.close()


def test_slow_models_keep_their_thread(monkeypatch):
    clock, reports = Clock(), queue.SimpleQueue()
    monkeypatch.setattr(instance_module, "time", clock)
    clock.run_us = 200
    instance = Instance("i", clock)
    for _ in range(60):
        instance.run([], lambda *report: reports.put(report))
        reports.get(timeout=20)
    assert not instance.is_fast
    instance.close()


class Counting(OneByOne):
    """Counts the requests that go through the line."""

    def __init__(self, line=None):
        super().__init__(line)
        self.added = 0

    def add(self, request, now_ns):
        self.added += 1
        super().add(request, now_ns)


def fast(model):
    made = Instance("i", model)
    made.is_fast = True
    return made


def test_a_request_that_meets_a_free_fast_instance_is_answered_before_submit_returns():
    model, statistics, policy = Slow(), ModelStatistics(), Counting()
    model.gate.set()
    driver = Driver(policy, [fast(model)], statistics)
    got = []
    for i in range(3):
        driver.submit(request(str(i)), got.append)
        assert len(got) == i + 1
    assert policy.added == 0
    assert (statistics.executions, statistics.success.count, statistics.queue.count) == (3, 3, 3)
    assert (statistics.pending, driver.num_open) == (0, 0)
    model.fails = True
    driver.submit(request("fails"), got.append)
    assert isinstance(got[-1], ServeError)
    assert "the model is broken" in got[-1].message
    assert statistics.failures["BACKEND"] == 1


def test_nobody_overtakes_a_request_that_waits():
    """While one runs on the caller's thread, others line up; they are run in order when it is done."""
    model, statistics, policy = Slow(), ModelStatistics(), Counting()
    driver = Driver(policy, [fast(model)], statistics)
    order: list[str] = []
    first = threading.Thread(target=driver.submit, args=(request("0"), lambda _: order.append("0")))
    first.start()
    wait_for(lambda: driver.num_open == 1)
    for name in ("1", "2"):
        driver.submit(request(name), lambda _, n=name: order.append(n))
    assert (policy.added, statistics.pending) == (2, 2)
    model.gate.set()
    first.join(20)
    assert order == ["0", "1", "2"]
    assert (statistics.pending, driver.num_open) == (0, 0)


def test_a_batcher_with_a_delay_starts_nothing_at_once():
    assert DynamicBatcher(BatchingRules(8)).starts_at_once
    assert not DynamicBatcher(BatchingRules(8, (), 100)).starts_at_once
    model, statistics = Slow(), ModelStatistics()
    model.gate.set()
    driver = Driver(DynamicBatcher(BatchingRules(8, (), 20_000)), [fast(model)], statistics)
    got = []
    for i in range(3):
        driver.submit(request(str(i)), got.append)
    assert not got
    wait_for(lambda: len(got) == 3)
    assert [len(b) for b in model.batches] == [3]
