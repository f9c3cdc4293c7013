"""Strided convolutions on few channels whose lines are read once, on the device: every candidate, odd sizes, NaN."""

from __future__ import annotations

import pytest

import venturi as vt
from tests.backends.cuda.test_early import matched, weight
from tests.gpu.test_cuda_early import check, device  # noqa: F401
from venturi.backends.cuda.tactics.stem_strips import StemStrips

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "shape, k, r, attrs",
    [
        ((16, 3, 224, 224), 64, 7, {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
        ((33, 3, 75, 61), 40, 3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((40, 4, 49, 50), 96, 3, {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
        ((20, 8, 64, 90), 24, 3, {"pads": [1, 0, 1, 1], "strides": [2, 2]}),
    ],
    ids=str,
)
def test_stems(device, shape, k, r, attrs):  # noqa: F811
    net = vt.Network()
    net.output("y", net.relu(net.conv(net.input("x", shape), weight(k, shape[1], r, r), weight(k), **attrs)))
    tactic = StemStrips(device)
    region, candidates = matched(net, tactic)
    assert not isinstance(candidates, str), candidates
    check(region, tactic, candidates, *shape)
