"""Products by two warpgroups in turns, on the device: every candidate, odd sizes, NaN, and runs back to back."""

from __future__ import annotations

import pytest

import venturi as vt
from tests.backends.cuda.test_early import matched, weight
from tests.gpu.test_cuda_early import check, device  # noqa: F401
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.pingpong import PINGPONG, PingpongConv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows, n, k", [(4096, 3072, 768), (6304, 768, 3072), (20001, 136, 72), (17000, 264, 8)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_products(device, rows, n, k, activation):  # noqa: F811
    net = vt.Network()
    net.output("y", getattr(net, activation)(net.input("x", (rows, k)) @ weight(k, n) + weight(n)))
    tactic = Gemm(device, PINGPONG)
    region, candidates = matched(net, tactic)
    check(region, tactic, candidates, rows, k)


@pytest.mark.parametrize(
    "shape, k, attrs",
    [
        ((64, 64, 28, 28), 64, {"pads": [1, 1, 1, 1]}),
        ((33, 128, 15, 13), 136, {"pads": [1, 0, 1, 2]}),
        ((40, 128, 28, 28), 256, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ],
    ids=str,
)
def test_convolutions(device, shape, k, attrs):  # noqa: F811
    net = vt.Network()
    net.output("y", net.relu(net.conv(net.input("x", shape), weight(k, shape[1], 3, 3), weight(k), **attrs)))
    tactic = PingpongConv(device)
    region, candidates = matched(net, tactic)
    assert not isinstance(candidates, str), candidates
    check(region, tactic, candidates, *shape)


@pytest.mark.parametrize("rows, n, k", [(4096, 3072, 768), (20001, 136, 72), (17000, 264, 264), (100352, 512, 128)])
def test_products_with_residuals(device, rows, n, k):  # noqa: F811
    net = vt.Network()
    net.output("y", net.relu(net.input("z", (rows, n)) + (net.input("x", (rows, k)) @ weight(k, n) + weight(n))))
    tactic = Gemm(device, PINGPONG)
    region, candidates = matched(net, tactic)
    plain = [{**c, "ahead": 0, "stays": False, "stages": 3} for c in candidates]
    ahead = [{**c, "ahead": c["groups"] + 1, "stays": False, "stages": 3} for c in candidates if c["columns"] < 256]
    check(region, tactic, [*candidates, *plain, *ahead], rows, k, residual=(rows, n))


@pytest.mark.parametrize("shape, k, stride", [((64, 64, 28, 28), 64, 1), ((40, 128, 28, 26), 136, 2)], ids=str)
def test_convolutions_with_residuals(device, shape, k, stride):  # noqa: F811
    net = vt.Network()
    size = (shape[0], k, shape[2] // stride, shape[3] // stride)
    made = net.conv(net.input("x", shape), weight(k, shape[1], 3, 3), weight(k), pads=[1] * 4, strides=[stride] * 2)
    net.output("y", net.relu(net.input("z", size) + made))
    tactic = PingpongConv(device)
    region, candidates = matched(net, tactic)
    ahead = [{**c, "ahead": c["groups"] + 1, "stays": False, "stages": 3} for c in candidates if c["columns"] < 256]
    check(region, tactic, [*candidates, *ahead], *shape, residual=size)
