"""Engines on an NVIDIA GPU: right answers, graphs, files, bad input."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import rand
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx

pytestmark = pytest.mark.gpu


def small(batch="n"):
    net = vt.Network()
    x = net.input("x", (batch, 16, 12, 12))
    y = net.relu(net.conv(x, rand(32, 16, 3, 3) * 0.1, rand(32), pads=[1, 1, 1, 1]))
    z = net.relu(net.conv(y, rand(32, 32, 1, 1, seed=1) * 0.2, rand(32, seed=2)) + y)
    pooled = net.reshape(net.global_average_pool(z), np.array([0, -1], dtype=np.int64))
    net.output("y", net.softmax(pooled @ rand(32, 10, seed=3)))
    return net


def reference(net, x):
    return Interpreter(import_onnx(net.to_model()).graph).run({"x": x})["y"]


@pytest.mark.parametrize("precision,tolerance", [("model", 1e-4), ("fp16", 2e-2), ("bf16", 5e-2)])
def test_engine_matches_the_interpreter_at_several_batches(precision, tolerance):
    net = small()
    engine = vt.build(net, device="cuda", precision=precision)
    for batch in (1, 3, 1, 8):
        x = rand(batch, 16, 12, 12, seed=batch)
        np.testing.assert_allclose(engine(x), reference(net, x), atol=tolerance)
    assert engine.device == "cuda:0"


def test_runs_are_graph_replays_with_results_of_their_own():
    net = small(4)
    engine = vt.build(net, device="cuda", precision="fp16")
    x, y = (torch.randn(4, 16, 12, 12, device="cuda") for _ in range(2))
    first = engine(x)
    kept = first.clone()
    engine(y)
    again = engine(x)
    assert torch.equal(first, kept)
    assert torch.equal(again, first)
    with engine.context() as ctx:
        ctx.run({"x": x})
        binding = ctx._context.binding_of([x])
        assert binding.graph is not None, binding.reason


def test_save_and_load_without_triton(tmp_path, monkeypatch):
    net = small(2)
    engine = vt.build(net, device="cuda", precision="fp16")
    engine.save(tmp_path / "m.vt")
    x = rand(2, 16, 12, 12)
    want = engine(x)
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    loaded = vt.load(tmp_path / "m.vt")
    np.testing.assert_array_equal(loaded(x), want)


def test_two_streams_and_two_threads_agree():
    from concurrent.futures import ThreadPoolExecutor

    engine = vt.build(small(4), device="cuda", precision="fp16")
    inputs = [torch.randn(4, 16, 12, 12, device="cuda") for _ in range(8)]
    want = [engine(x) for x in inputs]

    def work(x):
        with torch.cuda.stream(torch.cuda.Stream()):
            out = engine(x)
            torch.cuda.current_stream().synchronize()
            return out

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for got, w in zip(pool.map(work, inputs * 4), want * 4):
            assert torch.equal(got, w)


def test_data_dependent_shapes_run_without_a_graph():
    net = vt.Network()
    x = net.input("x", (4, 5))
    net.output("y", net.non_zero(net.relu(x)))
    engine = vt.build(net, device="cuda")
    x = rand(4, 5)
    np.testing.assert_array_equal(engine(x), np.stack(np.nonzero(np.maximum(x, 0))))


def test_absent_gpu_and_wrong_shapes():
    with pytest.raises(vt.DeviceError, match="cuda:99"):
        vt.build(small(), device="cuda:99")
    engine = vt.build(small(2), device="cuda", opt_level=0)
    with pytest.raises(vt.ShapeError):
        engine(rand(3, 16, 12, 12))


def test_memory_that_is_told_is_what_a_run_takes():
    torch.cuda.empty_cache()
    engine = vt.build(small(64), device="cuda", opt_level=0)
    said = engine.device_memory_bytes
    assert said == engine.device_memory_bytes
    activations = 64 * 12 * 12 * 32 * 4
    assert activations < said < 40 * activations
    with engine.context() as ctx:
        before = torch.cuda.memory_reserved()
        ctx.run({"x": torch.randn(64, 16, 12, 12)})
        grown = torch.cuda.memory_reserved() - before
        assert ctx.arena_bytes <= said
        assert grown <= said + (64 << 20)


def test_no_memory_left_is_said_with_what_there_is():
    engine = vt.build(small("n"), device="cuda", opt_level=0)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(vt.DeviceError, match="GiB free"):
            engine(torch.randn(100_000, 16, 12, 12))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine(rand(2, 16, 12, 12)).shape == (2, 10)


def test_what_is_bound_outlives_its_engine():
    import gc

    net, x = small(2), rand(2, 16, 12, 12)
    bound = vt.build(net, device="cuda").bind({"x": x})
    gc.collect()
    vt.build(small(3), device="cuda", opt_level=0)(rand(3, 16, 12, 12))
    bound.run()
    np.testing.assert_allclose(bound.outputs["y"].cpu(), reference(net, x), atol=1e-4)


def test_nothing_is_left_of_a_thousand_engines(tmp_path, monkeypatch):
    import gc

    from venturi.backends.cuda.driver import Driver

    calls, real = Counter(), Driver.call

    def counted(self, name, *args):
        calls[name] += 1
        real(self, name, *args)

    monkeypatch.setattr(Driver, "call", counted)
    net, x = small(2), torch.randn(2, 16, 12, 12)
    vt.build(net, device="cuda", opt_level=0).save(tmp_path / "m.vt")

    def cycle(i):
        engine = vt.load(tmp_path / "m.vt") if i % 20 else vt.build(net, device="cuda", opt_level=0)
        engine(x)

    for i in range(40):
        cycle(i)
    gc.collect()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for i in range(960):
        cycle(i)
    gc.collect()
    cycle(1)
    kernels = calls["cuModuleLoadData"] / 1001
    assert calls["cuModuleLoadData"] - calls["cuModuleUnload"] <= 20 * kernels
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.cuda.memory_reserved() <= reserved


def test_an_engine_for_another_architecture_is_refused(tmp_path, monkeypatch):
    from venturi.engine.target import CudaTarget

    engine = vt.build(small(2), device="cuda", opt_level=0)
    real = CudaTarget.fingerprint
    monkeypatch.setattr(CudaTarget, "fingerprint", lambda self: real(self) | {"arch": "sm_100"})
    engine.save(tmp_path / "m.vt")
    monkeypatch.setattr(CudaTarget, "fingerprint", real)
    with pytest.raises(vt.EngineError, match="sm_100"):
        vt.load(tmp_path / "m.vt")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, heads, head", [(128, 12, 64), (197, 3, 32), (1, 2, 128)])
def test_every_attention_tactic_is_right_or_rejected_by_its_match(rows, heads, head, causal):
    """Building verifies each candidate against the reference; a rejected one carries the word `wrong`."""
    net = vt.Network("attention")
    x = net.input("x", (2, rows, 3 * heads * head), "float16")
    parts = net.split(x, num_outputs=3, axis=-1)
    q, k, v = (net.transpose(net.reshape(p, np.array([2, rows, heads, head])), perm=[0, 2, 1, 3]) for p in parts)
    net.output("y", net.attention(q, k, v, is_causal=int(causal)))
    engine = vt.build(net, device="cuda")
    (step,) = [s for s in engine.plan.steps if "Attention" in s.ops]
    timed = {m.tactic for m in step.measurements if m.median_us is not None}
    reasons = {m.tactic: m.reason for m in step.measurements if "attention" in m.tactic or "sdpa" in m.tactic}
    assert {"triton-attention", "cudnn-attention", "aten-sdpa"} <= timed, reasons
    data = np.random.default_rng(0).standard_normal((2, rows, 3 * heads * head)).astype(np.float16)
    want = vt.build(net, device="cpu", precision="fp32").run({"x": data})["y"].astype(np.float32)
    np.testing.assert_allclose(engine.run({"x": data})["y"].astype(np.float32), want, rtol=2e-3, atol=2e-3)
