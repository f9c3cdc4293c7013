"""Engines of fp32 on an NVIDIA GPU: exact by default, rounded to tf32 only where that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import rand
from venturi.backends.reference.program import Program
from venturi.engine.builder import stored_weights
from venturi.frontends.onnx_import import import_onnx

pytestmark = pytest.mark.gpu


def images(batch=4):
    net = vt.Network()
    x = net.input("x", (batch, 16, 20, 20))
    y = net.relu(net.conv(x, rand(64, 16, 3, 3), rand(64), pads=[1, 1, 1, 1]))
    y = net.relu(net.conv(y, rand(64, 64, 1, 1, seed=1), rand(64, seed=2)) + y)
    y = net.conv(y, rand(64, 1, 3, 3, seed=3), rand(64, seed=4), group=64, pads=[1, 1, 1, 1])
    net.output("y", net.conv(y, rand(32, 64, 3, 3, seed=5), strides=[2, 2]))
    return net, rand(batch, 16, 20, 20, seed=9)


def tokens(rows=96):
    net = vt.Network()
    x = net.input("x", (2, rows, 192))
    q, k, v = (x @ rand(192, 192, seed=i) for i in (1, 2, 3))
    y = net.attention(q * 0.02, k * 0.02, v, q_num_heads=3, kv_num_heads=3)
    y = net.gelu(y @ rand(192, 768, seed=4) + rand(768)) @ rand(768, 192, seed=5) + x
    net.output("y", y)
    return net, rand(2, rows, 192, seed=9)


def wide(net, x):
    """What the network computes in fp64."""
    graph = import_onnx(net.to_model()).graph
    weights = {n: w.double() if w.is_floating_point() else w for n, w in stored_weights(graph).items()}
    return Program(graph, weights).run([torch.from_numpy(x).double()])[0].numpy()


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("make", [images, tokens])
def test_fp32_is_not_rounded(make, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net, x = make()
    engine = vt.build(net, device="cuda")
    assert error(engine(x), wide(net, x)) < 3e-6
    timed = {m.tactic for s in engine.plan.steps for m in s.measurements if m.median_us is not None}
    assert make is images or "triton-attention" in timed


@pytest.mark.parametrize("make", [images, tokens])
def test_tf32_is_as_exact_as_halves(make):
    net, x = make()
    engine = vt.build(net, device="cuda", precision="tf32")
    assert error(engine(x), wide(net, x)) < 4e-3
    timed = {m.tactic for s in engine.plan.steps for m in s.measurements if m.median_us is not None}
    assert make is images or "triton-attention" in timed
    assert timed & {"triton-conv", "triton-gemm", "triton-gemm-tma"}


@pytest.mark.parametrize("m,n,k", [(4096, 4096, 4096), (200, 1000, 2048), (50, 37, 129), (1, 1000, 2048)])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_every_kernel_of_products_agrees(precision, m, n, k):
    net = vt.Network()
    x = net.input("x", (m, k))
    net.output("y", net.relu(x @ rand(k, n) + rand(n, seed=2)))
    engine = vt.build(net, device="cuda", precision=precision)
    (step,) = engine.plan.steps
    ours = [m for m in step.measurements if m.tactic.startswith("triton")]
    held = [m for m in ours if k < 4096 or precision == "tf32" or m.config.get("rounded")]
    assert not [(m.config, m.reason) for m in held if m.reason.startswith(("max error", "NaN"))]
    assert [m for m in held if m.median_us is not None]
