"""Lengths of requests for benchmarks, and figures that follow from known times."""

from __future__ import annotations

import statistics

import pytest

from tests.llm.tiny import make
from venturi import LLM, KvCacheConfig, RequestError
from venturi.llm.workloads import SHAREGPT_MEANS, Ask, measure, workload


def test_fixed_lengths():
    load = workload("fixed", None, 9, 3, 100, 512)
    assert (load.asks, load.shared) == ([Ask(28, 9)] * 3, 100)
    assert workload("fixed", 10, 9, 1, 100, 512).asks == [Ask(0, 9)]


def test_conversations_have_the_means_and_fit_the_context():
    asks = workload("sharegpt", None, None, 20_000, 0, 1 << 20).asks
    assert statistics.mean(a.prompt for a in asks) == pytest.approx(SHAREGPT_MEANS[0], rel=0.05)
    assert statistics.mean(a.output for a in asks) == pytest.approx(SHAREGPT_MEANS[1], rel=0.05)
    assert len({a.prompt for a in asks}) > 500
    assert asks == workload("sharegpt", None, None, 20_000, 0, 1 << 20).asks
    cut = workload("sharegpt", None, None, 500, 10, 300).asks
    assert max(10 + a.prompt + a.output for a in cut) <= 300
    assert min(min(a.prompt, a.output) for a in cut) >= 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("uniform", 1, 1, 1, 0, 99), "expected one of fixed, sharegpt"),
        (("fixed", 90, 10, 1, 0, 99), "exceed the context of 99"),
        (("sharegpt", None, None, 1, 95, 99), "no room"),
        (("fixed", 0, 10, 1, 0, 99), "positive"),
        (("fixed", 1, 10, 0, 0, 99), "positive"),
    ],
)
def test_what_has_no_room_is_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        workload(*arguments)


@pytest.mark.parametrize(("name", "has_roofline"), [("llama2", True), ("mixtral", False)])
def test_figures(tmp_path, name, has_roofline):
    make(name, tmp_path)
    with LLM(tmp_path, device="cpu", kv_cache=KvCacheConfig(max_tokens=1024), skip_tokenizer_init=True) as llm:
        found = measure(llm, workload("fixed", 20, 5, 4, 12, 256))
    assert (found["requests"], found["input_tokens"], found["output_tokens"]) == (4, 80, 20)
    assert found["output_tokens_per_s"] == pytest.approx(20 / found["wall_s"])
    assert found["total_tokens_per_s"] == pytest.approx(100 / found["wall_s"])
    assert found["ms"]["ttft"]["p50"] <= found["ms"]["e2e"]["p50"] <= 1e3 * found["wall_s"]
    assert (found["roofline_percent"] is not None) == has_roofline
