"""Which 3-D convolutions cuDNN is asked for, and in which words. The plans themselves run in tests/gpu."""

from __future__ import annotations

import pytest
import torch

import venturi as vt
from tests.passes.harness import optimize, rand
from venturi.backends.base import RegionView
from venturi.backends.cuda.lib.cudnn import channels_last_strides
from venturi.backends.cuda.tactics.volumes import Volumes, read_volumes
from venturi.engine.builder import stored_weights


def found(precision="fp16", channels=16, size=(6, 10, 12), ending="relu", **attrs):
    net = vt.Network()
    x = net.input("x", (2, channels, *size))
    y = net.conv(x, rand(32, channels // attrs.get("group", 1), 3, 3, 3), rand(32), **({"pads": [1] * 6} | attrs))
    net.output("y", getattr(net, ending)(y))
    graph = optimize(net, precision).graph
    weights = stored_weights(graph)
    return next(read_volumes(r) for n in graph if (r := RegionView(n, weights)).anchor.op_type == "Conv")


def test_a_convolution_with_its_epilogue():
    made = found(strides=[1, 2, 2], group=2)
    assert isinstance(made, Volumes)
    p = made.problem
    assert (p.image, p.weight, p.output) == ((2, 16, 6, 10, 12), (32, 8, 3, 3, 3), (2, 32, 6, 5, 6))
    assert (p.pads, p.strides, p.dilations) == ((1, 1, 1), (1, 2, 2), (1, 1, 1))
    assert p.steps == (("bias", None), ("Relu", None))
    assert p.dtype == torch.float16


@pytest.mark.parametrize("precision, rounds", [("model", False), ("tf32", True)])
def test_fp32_says_whether_it_may_be_rounded(precision, rounds):
    made = found(precision, channels=12)
    assert made.problem.dtype == torch.float32
    assert made.problem.tf32 is rounds


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(channels=12), "12 to 32 channels in 1 groups"),
        (dict(pads=[1, 1, 1, 0, 1, 1]), "pads differ"),
        (dict(pads=[0] * 6, auto_pad="SAME_UPPER"), "pads differ"),
        (dict(size=(6, 10, "w")), "fixed shapes"),
        (dict(ending="hard_swish"), "no cuDNN operation for HardSwish"),
    ],
    ids=lambda v: str(v),
)
def test_others_are_left_to_torch(given, reason):
    assert reason in found(**given)


def test_strides_with_the_channels_last():
    x = torch.empty(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert channels_last_strides(x.shape) == list(x.stride())
    y = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert channels_last_strides(y.shape) == list(y.stride())
