"""Convolutions that are not plain images: transposed, of rows, of volumes, grouped; every candidate that runs is right."""

from __future__ import annotations

import pytest

import venturi as vt
from tests.gpu.test_cuda_fp32 import error, wide
from tests.passes.harness import rand

pytestmark = pytest.mark.gpu


def transposed(net):
    x = net.input("x", (2, 64, 17, 20))
    y = net.relu(net.conv_transpose(x, rand(64, 32, 4, 4), rand(32), strides=[2, 2], pads=[1, 1, 1, 1]))
    y = net.relu(net.conv_transpose(y, rand(32, 32, 2, 2), strides=[2, 2]))
    net.output("y", net.conv_transpose(y, rand(32, 48, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]))
    return (2, 64, 17, 20)


def rows(net):
    x = net.input("x", (2, 64, 400))
    y = net.gelu(net.conv(x, rand(128, 64, 3), rand(128), pads=[1, 1]))
    y = net.relu(net.conv(y, rand(128, 128, 3, seed=1), rand(128), pads=[2, 0]) + y)
    net.output("y", net.conv(y, rand(64, 128, 5, seed=2), strides=[2]))
    return (2, 64, 400)


def volumes(net):
    x = net.input("x", (2, 16, 6, 10, 12))
    y = net.relu(net.conv(x, rand(32, 16, 3, 3, 3), rand(32), pads=[1] * 6))
    y = net.relu(net.conv(y, rand(32, 32, 3, 3, 3, seed=1), rand(32), pads=[1] * 6) + y)
    net.output("y", net.conv(y, rand(32, 16, 1, 3, 3, seed=2), group=2, strides=[1, 2, 2]))
    return (2, 16, 6, 10, 12)


def groups(net):
    x = net.input("x", (2, 64, 14, 14))
    y = net.relu(net.conv(x, rand(64, 16, 3, 3), rand(64), group=4, pads=[1] * 4))
    net.output("y", net.conv(y, rand(32, 2, 3, 3, seed=1), group=32))
    return (2, 64, 14, 14)


EXPECTED = {
    transposed: {"triton-conv-transposed"}, rows: {"triton-conv"}, volumes: {"cudnn-conv-3d"},
    groups: {"aten-cudnn", "cudnn-conv"},
}  # fmt: skip


@pytest.mark.parametrize("precision,tolerance", [("model", 5e-6), ("tf32", 5e-3), ("fp16", 5e-3)])
@pytest.mark.parametrize("make", EXPECTED, ids=lambda f: f.__name__)
def test_candidates_agree(make, precision, tolerance):
    net = vt.Network()
    x = rand(*make(net), seed=9)
    engine = vt.build(net, device="cuda", precision=precision)
    assert error(engine(x).astype("f8"), wide(net, x)) < tolerance
    measured = [m for s in engine.plan.steps for m in s.measurements]
    assert EXPECTED[make] <= {m.tactic for m in measured if m.median_us is not None}
    ours = [m for m in measured if m.tactic.startswith("triton")]
    assert not [m for m in ours if m.reason.startswith(("max error", "NaN"))]
