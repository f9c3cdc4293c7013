"""The response cache and the warm-up, alone and in a server."""

from __future__ import annotations

import urllib.request

import numpy as np
import pytest
import tritonclient.http as http_client
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.running import add_engine, scaled, serving
from tests.serve.test_python_models import ADD_SUB, add_python
from venturi.serve.errors import ServeError
from venturi.serve.request import InferRequest, InferResponse, RequestedOutput, Tensor
from venturi.serve.response_cache import _OVERHEAD, ResponseCache, request_key


def asked(value: float = 0.0, shape=(1, 4), name: str = "x", dtype=np.float32, outputs=()) -> InferRequest:
    kind = {"f": "FP32", "i": "INT32"}[np.dtype(dtype).kind]
    tensor = Tensor(name, kind, np.full(shape, value, dtype))
    return InferRequest("m", "", {name: tensor}, outputs=[RequestedOutput(o) for o in outputs])


def answer(size: int) -> InferResponse:
    return InferResponse({"y": Tensor("y", "UINT8", np.zeros(size, np.uint8))})


def test_the_key_is_what_was_asked() -> None:
    key = request_key("m", 1, "s", asked(1.0))
    same = asked(1.0)
    same.id, same.parameters = "other", {"a": 1}
    assert request_key("m", 1, "s", same) == key
    others = [
        request_key("m", 2, "s", asked(1.0)), request_key("n", 1, "s", asked(1.0)),
        request_key("m", 1, "other files", asked(1.0)), request_key("m", 1, "s", asked(2.0)),
        request_key("m", 1, "s", asked(1.0, (4, 1))), request_key("m", 1, "s", asked(1.0, name="z")),
        request_key("m", 1, "s", asked(1.0, outputs=["y"])), request_key("m", 1, "s", asked(1.0, dtype=np.int32)),
    ]  # fmt: skip
    assert len({key, *others}) == len(others) + 1
    strings = [Tensor("x", "BYTES", np.array(v, dtype=object)) for v in ([b"ab", b"c"], [b"a", b"bc"])]
    assert len({request_key("m", 1, "s", InferRequest("m", "", {"x": t})) for t in strings}) == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400), st.booleans()), max_size=80))
def test_the_cache_is_an_lru_of_bounded_size(steps) -> None:
    cache, order = ResponseCache(2000), {}
    for name, size, reads in steps:
        key = bytes([name])
        if reads:
            got = cache.get(key)
            assert (got is None) == (key not in order)
            if got is not None:
                assert got.outputs["y"].data.size == order[key]
                order[key] = order.pop(key)
            continue
        cache.put(key, answer(size))
        order.pop(key, None)
        order[key] = size
        while sum(s + _OVERHEAD for s in order.values()) > 2000:
            order.pop(next(iter(order)))
        assert cache.num_bytes == sum(s + _OVERHEAD for s in order.values())
    cache.put(b"huge", answer(3000))
    assert cache.get(b"huge") is None


CACHED = "max_batch_size: 4 response_cache { enable: true }"


def test_repeated_requests_are_not_computed(tmp_path) -> None:
    add_engine(tmp_path, "cached", scaled(2.0), CACHED)
    add_engine(tmp_path, "plain", scaled(2.0))
    with (
        serving(tmp_path, cache=ResponseCache(1 << 16)) as server,
        http_client.InferenceServerClient(server.url("http")) as client,
    ):
        for model in ("cached", "plain"):
            for value in (1.0, 1.0, 2.0, 1.0):
                x = http_client.InferInput("x", [1, 4], "FP32")
                x.set_data_from_numpy(np.full((1, 4), value, np.float32))
                got = client.infer(model, [x], request_id=str(value))
                assert got.as_numpy("y")[0, 0] == 2 * value
                assert got.get_response()["id"] == str(value)
        cached, plain = (client.get_inference_statistics(m)["model_stats"][0] for m in ("cached", "plain"))
        counts = {
            k: cached["inference_stats"][k]["count"] for k in ("success", "cache_hit", "cache_miss", "compute_infer")
        }
        assert counts == {"success": 4, "cache_hit": 2, "cache_miss": 2, "compute_infer": 2}
        assert plain["inference_stats"]["cache_hit"]["count"] == 0
        with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        assert 'nv_cache_num_hits_per_model{model="cached",version="1"} 2' in lines
        assert not [line for line in lines if "cache_num_hits" in line and "plain" in line]


def test_caching_is_refused_where_it_cannot_be_right(tmp_path) -> None:
    add_engine(tmp_path, "m", scaled(2.0), CACHED + " model_transaction_policy { decoupled: true }")
    with pytest.raises(ServeError, match="response cache is not available"), serving(tmp_path):
        pass


WARM = 'model_warmup { name: "%s" batch_size: 2 count: 3 inputs { key: "x" value: { data_type: TYPE_FP32 dims: [%s] %s } } }'


@pytest.mark.parametrize("how", ["zero_data: true", "random_data: true", 'input_data_file: "sample"'])
def test_warm_up_runs_before_ready_and_is_not_counted(tmp_path, how) -> None:
    folder = add_engine(tmp_path, "m", scaled(2.0), "max_batch_size: 4 " + WARM % ("w", "4", how))
    (folder / "warmup").mkdir()
    (folder / "warmup" / "sample").write_bytes(np.ones((2, 4), np.float32).tobytes())
    with serving(tmp_path) as server:
        served = server.running.core.repository.find("m")
        assert served.statistics.executions == 0


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (WARM % ("wide", "5", "zero_data: true"), "warm-up sample 'wide' of model 'm' fails"),
        (WARM % ("free", "-1", "zero_data: true"), "expected positive numbers"),
        (WARM % ("gone", "4", 'input_data_file: "nothing"'), "cannot read the warm-up data"),
        (WARM % ("out", "4", 'input_data_file: "../config.pbtxt"'), "leaves"),
    ],
)
def test_a_warm_up_that_fails_fails_the_load(tmp_path, sample, says) -> None:
    add_engine(tmp_path, "m", scaled(2.0), "max_batch_size: 4 " + sample)
    with pytest.raises(ServeError, match=says), serving(tmp_path):
        pass


def test_warm_up_of_python_models(tmp_path) -> None:
    broken = ADD_SUB.replace(
        "responses = []", "responses = []\n            if len(requests) == 1: raise ValueError('cold')", 1
    )
    values = "".join(
        f'inputs {{ key: "{n}" value: {{ data_type: TYPE_FP32 dims: [3] zero_data: true }} }} ' for n in "ab"
    )
    add_python(tmp_path, "m", broken, f'backend: "python" model_warmup {{ name: "w" batch_size: 1 {values} }}')
    with pytest.raises(ServeError, match="ValueError: cold"), serving(tmp_path):
        pass
