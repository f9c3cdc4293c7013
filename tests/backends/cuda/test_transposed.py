"""Transposed convolutions by phases, run by Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest

import venturi as vt
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.backends.cuda.test_clusters import run_all, tensor
from tests.backends.cuda.test_contractions import weight
from venturi.backends.cuda.tactics.transposed import TransposedConv

SHAPES = {
    "up": dict(kernel=(2, 2), strides=[2, 2]),
    "gan": dict(kernel=(4, 4), strides=[2, 2], pads=[1, 1, 1, 1]),
    "odd": dict(kernel=(3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "wide": dict(kernel=(5, 3), strides=[3, 2], pads=[2, 0, 1, 1], output_padding=[0, 1]),
    "gaps": dict(kernel=(1, 2), strides=[3, 3]),
    "unit": dict(kernel=(3, 3), strides=[1, 1], pads=[1, 1, 1, 1]),
    "cropped": dict(kernel=(2, 2), strides=[2, 2], pads=[3, 2, 3, 2]),
}


def network(kernel, outputs=24, channels=32, group=1, **attrs):
    net = vt.Network()
    x, bias = net.input("x", (2, channels, 5, 7)), weight(outputs * group, seed=8)
    y = net.conv_transpose(x, weight(channels, outputs, *kernel), bias, group=group, **attrs)
    net.output("y", net.relu(y))
    return net


@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_phase_reads_its_own_taps(shape, precision):
    device = InterpretedDevice()
    net = network(**SHAPES[shape])
    assert run_all(net, TransposedConv(device), {"x": tensor(2, 32, 5, 7)}, precision) == 1
    assert device.launched == ["transposed"] * 2


def test_residuals_are_added():
    net = vt.Network()
    x, skip = net.input("x", (1, 32, 4, 4)), net.input("skip", (1, 16, 8, 8))
    net.output("y", net.relu(net.conv_transpose(x, weight(32, 16, 2, 2), strides=[2, 2]) + skip))
    inputs = {"x": tensor(1, 32, 4, 4, special=False), "skip": tensor(1, 16, 8, 8, seed=3)}
    assert run_all(net, TransposedConv(InterpretedDevice()), inputs, "fp16") == 1


@pytest.mark.parametrize(
    "attrs, reason",
    [
        (dict(group=2), "groups"),
        (dict(dilations=[2, 2]), "dilations"),
        (dict(auto_pad="SAME_UPPER", strides=[2, 2]), "input size"),
        (dict(channels=12), "12 channels"),
    ],
    ids=lambda a: str(a),
)
def test_others_are_left_to_libraries(attrs, reason):
    from tests.passes.harness import optimize
    from venturi.backends.base import RegionView
    from venturi.engine.builder import stored_weights

    model = optimize(network((3, 3), outputs=16, **attrs), "fp16")
    found = [TransposedConv(InterpretedDevice()).match(RegionView(n, stored_weights(model.graph))) for n in model.graph]
    assert any(isinstance(f, str) and reason in f for f in found), found
    assert all(isinstance(f, str) for f in found)
