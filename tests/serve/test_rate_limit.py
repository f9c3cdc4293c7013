"""The rate limiter: who starts next, what can never start, and models that share a resource on a real server."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import venturi as vt
from tests.serve.running import add_engine, serving
from venturi.serve.errors import ServeError
from venturi.serve.schedulers.rate_limit import (
    GLOBAL,
    LimitedInstance,
    RateLimiter,
    Resource,
    parse_rate_limit,
)

R = Resource("R", GLOBAL)


class Log:
    """Stages by label; `started` in order."""

    def __init__(self, limiter):
        self.limiter, self.started, self.tickets = limiter, [], {}

    def add(self, label, count=1, priority=0, resource=R):
        self.tickets[label] = self.limiter.ticket(label, {resource: count} if count else {}, priority)

    def stage(self, *labels):
        for label in labels:
            self.limiter.stage(self.tickets[label], lambda label=label: self.started.append(label))

    def release(self, label):
        self.limiter.release(self.tickets[label])


def test_a_resource_is_held_until_the_run_is_over():
    log = Log(RateLimiter({("R", None): 2}))
    for label in "abc":
        log.add(label)
    log.stage("a", "b", "c")
    assert log.started == ["a", "b"]
    log.release("a")
    assert log.started == ["a", "b", "c"]


def test_fewest_scaled_executions_first_then_longest_waiting():
    log = Log(RateLimiter({("R", None): 1}))
    log.add("often", priority=1)
    log.add("rarely", priority=3)
    log.add("hold")
    for _ in range(2):
        for label in ("often", "rarely"):
            log.stage(label)
            log.release(label)
    log.stage("hold")
    log.started.clear()
    log.stage("rarely", "often")
    log.release("hold")
    assert log.started == ["often"]
    log.release("often")
    assert log.started == ["often", "rarely"]
    log.release("rarely")
    log.stage("hold", "often")
    assert log.started[2:] == ["hold"]


def test_nobody_overtakes_the_first_that_waits():
    log = Log(RateLimiter({("R", None): 2}))
    log.add("one", 1)
    log.add("both", 2)
    log.add("free", 0)
    log.stage("one", "both", "free")
    assert log.started == ["one"], "`free` needs nothing, but `both` is in front of it"
    log.release("one")
    assert log.started == ["one", "both", "free"]


def test_without_a_limit_there_is_as_much_as_the_largest_claim():
    log = Log(RateLimiter())
    log.add("small", 1)
    log.add("large", 3)
    log.stage("small", "large")
    assert log.started == ["small"]
    log.release("small")
    assert log.started == ["small", "large"]


def test_devices_have_resources_of_their_own():
    limiter = RateLimiter({("R", "1"): 4, ("R", None): 1})
    log = Log(limiter)
    log.add("gpu0", 1, resource=Resource("R", "0"))
    log.add("gpu1", 4, resource=Resource("R", "1"))
    log.stage("gpu0", "gpu1")
    assert log.started == ["gpu0", "gpu1"]
    with pytest.raises(ServeError, match="instance m_0 needs 2 of resource 'R' on 0, --rate-limit-resource gives 1"):
        limiter.ticket("m_0", {Resource("R", "0"): 2}, 0)


@pytest.mark.parametrize("text", ["R", "R:", "R:-1", ":4", "R:4:x", "R:many"])
def test_malformed_limits(text):
    with pytest.raises(ServeError, match="must be NAME:COUNT"):
        parse_rate_limit("execution_count", [text])


def test_modes():
    assert parse_rate_limit("off", []) is None
    assert parse_rate_limit("execution_count", ["R:4", "R:2:0", "S:1:global"]) is not None
    with pytest.raises(ServeError, match="off or execution_count"):
        parse_rate_limit("on", [])
    with pytest.raises(ServeError, match="needs --rate-limit execution_count"):
        parse_rate_limit("off", ["R:4"])


class Busy:
    """Counts how many run at once."""

    runs_inline = True

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def execute(self, requests):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.002)
        with self.lock:
            self.now -= 1
        return requests


@pytest.mark.parametrize("limit, most", [(1, 1), (2, 2)])
def test_instances_run_no_more_at_once_than_the_resource_allows(limit, most):
    limiter, model, done = RateLimiter({("R", None): limit}), Busy(), threading.Semaphore(0)
    instances = [LimitedInstance(str(i), model, limiter, limiter.ticket(str(i), {R: 1}, 0)) for i in range(4)]

    def again(instance, requests, outcome):
        done.release()

    for _ in range(5):
        for instance in instances:
            instance.run([], again)
        for _ in instances:
            assert done.acquire(timeout=10)
    assert model.most == most
    for instance in instances:
        assert not instance.is_fast
        instance.close()


LIMITED = """
instance_group [ {{ count: 2 kind: KIND_CPU
  rate_limiter {{ resources [ {{ name: "R" global: true count: {count} }} ] priority: {priority} }} }} ]
"""


def twice(name):
    net = vt.Network(name)
    net.output("y", net.input("x", (1, 4)) * np.float32(2))
    return net


def test_models_of_a_server_share_a_resource(tmp_path):
    import tritonclient.http as http

    add_engine(tmp_path, "a", twice("a"), LIMITED.format(count=1, priority=1))
    add_engine(tmp_path, "b", twice("b"), LIMITED.format(count=2, priority=2))
    with serving(tmp_path, limiter=parse_rate_limit("execution_count", ["R:2"])) as server:

        def call(i):
            client = http.InferenceServerClient(server.url("http"))
            x = http.InferInput("x", [1, 4], "FP32")
            x.set_data_from_numpy(np.full((1, 4), i, np.float32))
            answer = client.infer("ab"[i % 2], [x]).as_numpy("y")
            client.close()
            return answer

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(call, range(60)))
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, np.full((1, 4), 2 * i))


def test_a_claim_beyond_the_limit_is_an_error_at_load(tmp_path):
    add_engine(tmp_path, "a", twice("a"), LIMITED.format(count=3, priority=1))
    with (
        pytest.raises(Exception, match="needs 3 of resource 'R'"),
        serving(tmp_path, limiter=parse_rate_limit("execution_count", ["R:2"])),
    ):
        pass
