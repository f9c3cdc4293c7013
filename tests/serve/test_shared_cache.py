"""Answers that outlive a model or a server: reloads forget them, Redis keeps them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import numpy as np
import pytest
import redis
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving, wait_for
from venturi.core.errors import DeviceError, ModelError
from venturi.serve import redis_cache
from venturi.serve.cache_settings import parse_cache_config
from venturi.serve.errors import ServeError, Status
from venturi.serve.redis_cache import RedisCache, packed, unpacked
from venturi.serve.repository import Mode
from venturi.serve.request import InferResponse, Tensor
from venturi.serve.response_cache import ResponseCache

CACHED = "max_batch_size: 4 response_cache { enable: true }"
ENSEMBLE = """platform: "ensemble" max_batch_size: 4 response_cache { enable: true }
input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling { step { model_name: "m" model_version: -1 input_map { key: "x" value: "x" }
output_map { key: "y" value: "y" } } }"""


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    made = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made.server_address
    made.shutdown()
    made.server_close()
    thread.join()


def opened(address: tuple[str, int], *more: str) -> Any:
    return parse_cache_config([f"redis,host={address[0]}", f"redis,port={address[1]}", *more])


def infer(url: str, model: str = "m", value: float = 1.0) -> float:
    with http_client.InferenceServerClient(url) as client:
        x = http_client.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.full((1, 4), value, np.float32))
        return float(client.infer(model, [x]).as_numpy("y")[0, 0])


def counts(server: Any, model: str = "m") -> dict[str, int]:
    statistics = server.running.core.repository.find(model).statistics
    return {"hit": statistics.cache_hit.count, "miss": statistics.cache_miss.count, "ran": statistics.executions}


@pytest.mark.parametrize("model", ["m", "e"])
def test_a_reload_of_changed_files_forgets(tmp_path: Path, model: str) -> None:
    add_engine(tmp_path, "m", scaled(2.0), CACHED)
    (tmp_path / "e" / "1").mkdir(parents=True)
    (tmp_path / "e" / "config.pbtxt").write_text(ENSEMBLE)
    with serving(tmp_path, mode=Mode.EXPLICIT, load=("*",), cache=ResponseCache(1 << 16)) as server:
        assert [infer(server.url("http"), model) for _ in range(2)] == [2, 2]
        add_engine(tmp_path, "m", scaled(3.0), CACHED)
        server.call(server.running.core.load("m"))
        assert infer(server.url("http"), model) == 3


def test_servers_share_what_lies_in_redis(tmp_path: Path, server: tuple[str, int]) -> None:
    add_engine(tmp_path, "m", scaled(2.0), CACHED)
    with serving(tmp_path, cache=opened(server, "redis,ttl=60")) as one:
        assert [infer(one.url("http"), value=v) for v in (1.0, 1.0, 2.0)] == [2, 2, 4]
        wait_for(lambda: counts(one) == {"hit": 1, "miss": 2, "ran": 2})
        with serving(tmp_path, cache=opened(server)) as other:
            assert infer(other.url("http")) == 2
            assert counts(other) == {"hit": 1, "miss": 0, "ran": 0}
    kept = redis.Redis(*server)
    keys = kept.keys()
    assert len(keys) == 2
    assert all(0 < kept.ttl(key) <= 60 for key in keys)


class Broken:
    """A client whose server has gone."""

    def __init__(self) -> None:
        self.calls = 0

    def get(self, key: bytes) -> bytes:
        self.calls += 1
        raise redis.ConnectionError("gone")

    set = get

    def close(self) -> None:
        return None


def test_models_compute_while_redis_is_gone(tmp_path: Path) -> None:
    add_engine(tmp_path, "m", scaled(2.0), CACHED)
    broken = Broken()
    with serving(tmp_path, cache=RedisCache(broken)) as server:
        assert [infer(server.url("http")) for _ in range(3)] == [2, 2, 2]
        assert counts(server)["ran"] == 3
    assert broken.calls == 1


@pytest.mark.parametrize("settle", [True, False])
def test_a_request_refused_behind_the_lookup_is_answered(tmp_path: Path, settle: bool) -> None:
    add_engine(tmp_path, "m", scaled(2.0), CACHED)
    with serving(tmp_path, cache=RedisCache(Broken())) as server:
        served = server.running.core.repository.find("m")

        def refuse(request: Any, done: Any) -> None:
            raise ServeError(Status.UNAVAILABLE, "full") if settle else ZeroDivisionError("bug")

        served.driver.submit = refuse  # type: ignore[method-assign]
        with pytest.raises(InferenceServerException, match="full" if settle else "bug"):
            infer(server.url("http"))


def test_lookups_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_cache, "MAX_OPEN", 6)
    threads, go = redis_cache.LookupThreads(), threading.Event()
    waiting = [threads.submit(go.wait) for _ in range(6)]
    with pytest.raises(ServeError, match="6 lookups"):
        threads.submit(go.wait)
    go.set()
    assert all(f.result(5) for f in waiting)
    wait_for(lambda: threads.submit(int).result(5) == 0)
    threads.shutdown()


def test_answers_survive_packing() -> None:
    text = np.array([[b"a", b"", b"\xff"]], dtype=object)
    answer = InferResponse(
        {"y": Tensor("y", "FP32", np.arange(6, dtype=np.float32).reshape(2, 3)), "s": Tensor("s", "BYTES", text),
         "e": Tensor("e", "INT64", np.zeros((0, 4), np.int64))},
        {"k": 1, "b": True, "t": "x"},
    )  # fmt: skip
    got = unpacked(packed(answer))
    assert got is not None
    assert got.parameters == answer.parameters
    assert list(got.outputs) == ["y", "s", "e"]
    for name, tensor in answer.outputs.items():
        np.testing.assert_array_equal(got.outputs[name].data, tensor.data)
        assert got.outputs[name].datatype == tensor.datatype
    data = packed(answer)
    for broken in (b"", b"\x05\x00\x00\x00nonsense", data[:-3], data[:20], b"\xff\xff\xff\xff" + data[4:]):
        assert unpacked(broken) is None


@pytest.mark.parametrize(("given", "told"), [
    (["memcached,size=1"], "must be local"), (["local,size=x"], "local,size=BYTES"), (["local"], "local,size=BYTES"),
    (["local,size=1,size=2"], "once each"), (["local,size=1", "redis,host=a"], "must be local"),
    (["redis,host"], "NAME=VALUE"), (["redis,hots=a"], "no setting 'hots'"), (["redis,port=x"], "must be a number"),
])  # fmt: skip
def test_wrong_settings_are_named(given: list[str], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        parse_cache_config(given)


def test_no_redis_at_the_start() -> None:
    with pytest.raises(DeviceError, match=r"no Redis at 127\.0\.0\.1:1"):
        parse_cache_config(["redis,host=127.0.0.1,port=1"])


def test_settings_that_are_right() -> None:
    assert parse_cache_config([]) is None
    assert isinstance(parse_cache_config(["local,size=1000"]), ResponseCache)
