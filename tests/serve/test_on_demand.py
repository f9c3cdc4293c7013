"""Models loaded by their first request, and unloaded when others need the room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

import venturi as vt
from tests.serve.running import add_engine, serving, wait_for
from venturi.serve.errors import ServeError
from venturi.serve.on_demand import _size
from venturi.serve.repository import Mode


def times(factor):
    net = vt.Network()
    net.output("y", net.input("x", (1, 4)) * np.float32(factor))
    return net


@pytest.fixture
def repository(tmp_path):
    for i, name in enumerate("abc"):
        add_engine(tmp_path, name, times(i + 2))
    return tmp_path


def ask(kind, url, name):
    """The first element of the answer to ones."""
    module = {"http": http, "grpc": grpc}[kind]
    client = module.InferenceServerClient(url)
    try:
        x = module.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.ones((1, 4), np.float32))
        return float(client.infer(name, [x]).as_numpy("y")[0, 0])
    finally:
        client.close()


def ready(server):
    return {r["name"] for r in server.running.core.repository.index(ready_only=True)}


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("mode", [Mode.NONE, Mode.EXPLICIT])
def test_a_model_is_loaded_by_its_first_request(repository, kind, mode):
    with serving(repository, mode=mode, load_on_demand=True) as server:
        assert ready(server) == set()
        assert ask(kind, server.url(kind), "b") == 3
        assert ready(server) == {"b"}
        with pytest.raises(InferenceServerException, match="'nope' is not found"):
            ask(kind, server.url(kind), "nope")


def test_many_first_requests_load_once(repository, monkeypatch):
    with serving(repository, load_on_demand=True) as server:
        loads = []
        real = server.running.core.repository.load

        async def counted(name, *rest):
            loads.append(name)
            await real(name, *rest)

        monkeypatch.setattr(server.running.core.repository, "load", counted)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask("http", server.url("http"), "a"), range(16)))
        assert answers == [2.0] * 16
        assert loads == ["a"]


def test_the_least_recently_asked_for_leaves(repository):
    budget = _size(repository / "a") + _size(repository / "b") + 10
    with serving(repository, load_on_demand=True, model_memory_budget=budget) as server:
        for name, want in (("a", 2), ("b", 3), ("a", 2), ("c", 4)):
            assert ask("http", server.url("http"), name) == want
        wait_for(lambda: ready(server) == {"a", "c"})
        assert ask("http", server.url("http"), "b") == 3
        wait_for(lambda: ready(server) == {"b", "c"})


def test_every_request_is_answered_while_models_come_and_go(repository):
    """Room for one model, requests for three at once: each gets its own model's answer, or is told about the budget."""
    with serving(repository, load_on_demand=True, model_memory_budget=1) as server:

        def call(i):
            try:
                return ask("http", server.url("http"), "abc"[i % 3]) == i % 3 + 2
            except InferenceServerException as exc:
                return "memory budget" in str(exc) or "unloaded" in str(exc) or "ready" in str(exc)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(call, range(48)))
        assert ask("http", server.url("http"), "a") == 2


def test_a_model_that_cannot_be_loaded_fails_its_requests_only(repository):
    (repository / "bad" / "1").mkdir(parents=True)
    (repository / "bad" / "1" / "model.vt").write_bytes(b"no")
    with serving(repository, load_on_demand=True) as server:
        with pytest.raises(InferenceServerException, match="failed to load 'bad'"):
            ask("http", server.url("http"), "bad")
        assert ask("http", server.url("http"), "a") == 2


def test_named_models_are_loaded_at_the_start_and_count(repository):
    with serving(repository, load_on_demand=True, load=("c",), model_memory_budget=_size(repository / "a")) as server:
        assert ready(server) == {"c"}
        assert ask("http", server.url("http"), "a") == 2
        wait_for(lambda: ready(server) == {"a"})


def test_without_it_unloaded_models_stay_unloaded(repository):
    with (
        serving(repository, mode=Mode.EXPLICIT) as server,
        pytest.raises((InferenceServerException, ServeError), match="not found"),
    ):
        ask("http", server.url("http"), "a")
