"""Requests a second of one client: the rule in made-up time, both protocols, keys, streams, the command's option."""

from __future__ import annotations

import queue

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import urllib3
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving
from venturi.serve import quota as module
from venturi.serve.quota import OverQuota, Quota
from venturi.serve.security import Gate


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def admitted(quota, client, count):
    """How many of `count` requests right now."""
    found = 0
    for _ in range(count):
        try:
            quota.admit(client)
        except OverQuota:
            continue
        found += 1
    return found


def test_a_second_s_worth_at_once_then_the_rate():
    clock = Clock()
    quota = Quota(5, clock)
    assert admitted(quota, "a", 20) == 5
    assert admitted(quota, "b", 3) == 3, "everyone has their own"
    clock.now += 0.5
    assert admitted(quota, "a", 20) == 2
    with pytest.raises(OverQuota, match=r"more than 5 requests a second; try again in 0\.1 s"):
        quota.admit("a")
    clock.now += 1000
    assert admitted(quota, "a", 20) == 5


def test_less_than_one_a_second():
    clock = Clock()
    quota = Quota(0.25, clock)
    assert admitted(quota, "a", 3) == 1
    with pytest.raises(OverQuota) as refused:
        quota.admit("a")
    assert refused.value.retry_s == 4
    clock.now += 3.5
    assert admitted(quota, "a", 1) == 0
    clock.now += 0.5
    assert admitted(quota, "a", 2) == 1


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_CLIENTS", 10)
    quota = Quota(1, Clock())
    for i in range(100):
        quota.admit(str(i))
    assert len(quota._buckets) == 10
    assert admitted(quota, "99", 1) == 0
    assert admitted(quota, "0", 1) == 1, "forgotten"


@pytest.fixture(params=[(), ("one", "two")], ids=["by address", "by key"])
def running(request, tmp_path):
    add_engine(tmp_path, "m", scaled(2.0))
    clock = Clock()
    with serving(tmp_path, gate=Gate(request.param, quota=Quota(3, clock))) as made:
        made.clock, made.keys = clock, request.param
        yield made


def get(running, path, key=""):
    return urllib3.request("GET", f"http://{running.url('http')}{path}", headers={"X-API-Key": key} if key else {})


def test_http(running):
    key = running.keys[0] if running.keys else ""
    found = [get(running, "/v2", key) for _ in range(5)]
    assert [a.status for a in found] == [200, 200, 200, 429, 429]
    assert found[4].headers["retry-after"] == "1"
    assert "more than 3 requests a second" in found[4].json()["error"]
    assert [get(running, "/v2/health/live").status for _ in range(9)] == [200] * 9
    if running.keys:
        assert get(running, "/v2", running.keys[1]).status == 200
        assert get(running, "/v2", "wrong").status == 401
    running.clock.now += 0.4
    assert [get(running, "/v2", key).status for _ in range(2)] == [200, 429]


def test_grpc_and_its_streams(running):
    headers = {"x-api-key": running.keys[0]} if running.keys else {}
    given = grpc_client.InferInput("x", [1, 4], "FP32")
    given.set_data_from_numpy(np.ones((1, 4), np.float32))
    with grpc_client.InferenceServerClient(running.url("grpc")) as client:
        client.infer("m", [given], headers=headers)
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
        for _ in range(4):
            client.async_stream_infer("m", [given])
        found = [answers.get(timeout=10) for _ in range(4)]
        assert [isinstance(f, InferenceServerException) for f in found] == [False, False, True, True]
        assert "more than 3 requests a second" in str(found[3])
        client.stop_stream()
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.get_server_metadata(headers=headers)
        assert all(client.is_server_live(headers=headers) for _ in range(9))
        running.clock.now += 1
        client.infer("m", [given], headers=headers)
