"""The arena: no two live buffers overlap, for any lifetimes; shape stability; the timing cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import venturi as vt
from tests.engine.models import nonzero
from venturi.engine.memory_plan import Lifetime, align, check_integrity, plan_memory
from venturi.engine.stability import stable_values
from venturi.frontends.onnx_import import import_onnx
from venturi.tuning.cache import Measurement, TimingCache

lifetimes = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 8)), max_size=30)


@settings(max_examples=200, deadline=None)
@given(lifetimes)
def test_live_buffers_never_overlap(raw: list[tuple[int, int, int]]) -> None:
    items = [Lifetime(i, size, first, first + length) for i, (size, first, length) in enumerate(raw)]
    plan = plan_memory(items)
    check_integrity(plan, items)
    assert all(offset % 64 == 0 for offset in plan.offsets.values())
    assert plan.total <= sum(align(i.size) for i in items)


def test_a_chain_needs_two_buffers() -> None:
    items = [Lifetime(i, 1000, i, i + 1) for i in range(20)]
    assert plan_memory(items).total == 2 * align(1000)


def test_overlap_is_found() -> None:
    items = [Lifetime(0, 64, 0, 2), Lifetime(1, 64, 1, 3)]
    plan = plan_memory(items)
    plan.offsets[1] = plan.offsets[0]
    with pytest.raises(AssertionError, match="overlap"):
        check_integrity(plan, items)


def test_arena_is_used_and_reused() -> None:
    net = vt.Network("chain")
    x = net.input("x", (64, 64))
    y = x
    for _ in range(6):
        y = net.matmul(y, x)
    net.output("y", net.relu(y) + x)
    engine = vt.build(net, opt_level=0)
    data = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    with engine.context() as context:
        first = context.run({"x": data})["y"]
        size = context.arena_bytes
        assert 0 < size <= 3 * 64 * 64 * 4
        np.testing.assert_array_equal(context.run({"x": data})["y"], first)
        assert context.arena_bytes == size


def test_values_behind_a_data_dependent_shape_are_not_stable() -> None:
    graph = import_onnx(nonzero().to_model()).graph
    stable = {v.name for v in stable_values(graph)}
    assert "x" in stable
    assert "index" not in stable
    assert "twice" not in stable


def test_shapes_computed_from_shapes_are_stable() -> None:
    net = vt.Network("shape")
    x = net.input("x", ("n", 4))
    flat = net.reshape(x, net.concat(net.shape(x)[0:1], np.array([2, 2], np.int64), axis=0))
    by_value = net.reshape(x, net.input("s", (2,), "int64"))
    net.output("a", net.relu(flat))
    net.output("b", net.relu(by_value))
    graph = import_onnx(net.to_model()).graph
    stable = {v.name for v in stable_values(graph)}
    assert "a" in stable
    assert "b" not in stable


def test_timing_cache_round_trip_merge_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    cache = TimingCache(path)
    cache.put("p", [Measurement("a", {}, 1.5), Measurement("b", {}, None, 0.0, "too slow")])
    cache.save()
    again = TimingCache(path)
    assert again.get("p") == [Measurement("a", {}, 1.5), Measurement("b", {}, None, 0.0, "too slow")]
    assert again.get("q") is None
    assert (again.hits, again.misses) == (1, 1)
    other = TimingCache(tmp_path / "d.json")
    other.put("q", [Measurement("a", {}, 2.0)])
    again.merge(other)
    again.save()
    assert TimingCache(path).get("q") is not None
    assert list(json.loads(path.read_text())["machines"]) != []
    path.write_text("{broken")
    with pytest.raises(vt.TuningError, match="not readable"):
        TimingCache(path)


def test_the_cache_decides_the_tactic(tmp_path: Path) -> None:
    """Edit the measured times, and the next build follows them."""
    path = tmp_path / "c.json"
    net = vt.Network("gemm")
    net.output("y", net.input("x", (8, 32)) @ np.ones((32, 16), np.float32))

    def prefer(measurements: list[dict[str, Any]]) -> None:
        for m in measurements:
            m["median_us"] = None if m["median_us"] is None else (1.0 if m["tactic"] == "aten-linear" else 99.0)

    assert _rebuilt(net, path, prefer).plan.steps[0].tactic == "aten-linear"


def _rebuilt(net: vt.Network, path: Path, change: Callable[[list[dict[str, Any]]], None]) -> vt.Engine:
    """Built, what the timing cache knows of every problem changed, and built again."""
    model = net.to_model()
    vt.build(model, timing_cache=path)
    data = json.loads(path.read_text())
    for entries in data["machines"].values():
        for measurements in entries.values():
            change(measurements)
    path.write_text(json.dumps(data))
    return vt.build(model, timing_cache=path)


def test_a_cached_winner_that_cannot_run_here_is_passed_over(tmp_path: Path) -> None:
    """The cache knows it as the fastest; this process has no such candidate."""
    path = tmp_path / "c.json"
    net = vt.Network("gemm")
    net.output("y", net.input("x", (8, 32)) @ np.ones((32, 16), np.float32))
    gone = {
        "tactic": "native-matrix-linear", "config": {"groups": 1}, "median_us": 0.1, "spread_us": 0.0, "reason": "",
    }  # fmt: skip
    step = _rebuilt(net, path, lambda measurements: measurements.append(gone)).plan.steps[0]
    assert step.tactic != "native-matrix-linear"
    assert any(m.tactic == "native-matrix-linear" for m in step.measurements), "taken from the cache all the same"


def test_only_cached_winners_are_expected_to_be_bound(tmp_path: Path) -> None:
    """What a GPU build compiles ahead: every candidate without a cache, one with it, the first at level 0."""
    from tests.passes.harness import optimize
    from venturi.backends.base import RegionView
    from venturi.backends.cpu.backend import CPU
    from venturi.engine.builder import stored_weights
    from venturi.tuning.tuner import Tuner

    path = tmp_path / "c.json"
    net = vt.Network("gemm")
    net.output("y", net.input("x", (8, 32)) @ np.ones((32, 16), np.float32))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "MatMul"]
    region = RegionView(node, stored_weights(model.graph))
    everything = Tuner(CPU, TimingCache(path)).expected(region)
    assert len(everything) >= 3
    chosen = vt.build(net.to_model(), device="cpu", timing_cache=path).plan.steps[0]
    assert [(t.name, dict(c)) for t, c in Tuner(CPU, TimingCache(path)).expected(region)] == [
        (chosen.tactic, chosen.config)
    ]
    assert len(Tuner(CPU, TimingCache(None), level=0).expected(region)) == 1
