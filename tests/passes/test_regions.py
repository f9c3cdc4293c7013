"""Which Regions form, and where a chain must end."""

from __future__ import annotations

import pytest

import venturi as vt
from tests.passes.harness import Build, check, gemm_bias_gelu, image, net_of, optimize, rand, regions


def conv_add_relu(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = image(net)
        y = net.conv(x, rand(4, 4, 3, 3), pads=[1] * 4)
        if variant == "output":
            net.output("c", y)
        other = rand(1, 4, 8, 8) if variant == "constant" else x[:, 0:1] if variant == "broadcast" else x
        y = y + other
        if variant == "used":
            net.output("s", net.exp(y))
        net.output("y", net.relu(y))

    return build


def gemm_bias_matrix(net: vt.Network) -> None:
    net.output("y", net.gelu(net.input("x", ("n", 3, 8)) @ rand(8, 5) + rand(3, 5)))


def chain(net: vt.Network) -> None:
    x, z = net.input("x", ("n", 6)), net.input("z", ("n", 6))
    net.output("y", net.exp(x * 2.0 + z) - net.sin(z))


def softmax_chain(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", net.softmax(x * 2.0, axis=-1) + 1.0)


def diamond(net: vt.Network) -> None:
    """A value read twice ends a cluster."""
    e = net.exp(net.input("x", ("n", 6)) + 1.0)
    net.output("y", net.sin(e) * net.cos(e))


@pytest.mark.parametrize(
    "build, expect",
    [
        (conv_add_relu("plain"), ["conv:Conv+Add+Relu"]),
        (conv_add_relu("output"), ["pointwise:Add+Relu"]),
        (conv_add_relu("used"), ["conv:Conv+Add"]),
        (conv_add_relu("constant"), ["pointwise:Add+Relu"]),
        (conv_add_relu("broadcast"), ["pointwise:Add+Relu"]),
        (gemm_bias_gelu, ["gemm:MatMul+Add+Gelu"]),
        (gemm_bias_matrix, ["pointwise:Add+Gelu"]),
        (chain, ["pointwise:Mul+Add+Exp+Sin+Sub"]),
        (softmax_chain, ["reduce:Mul+Softmax+Add"]),
        (diamond, ["pointwise:Add+Exp", "pointwise:Sin+Cos+Mul"]),
    ],
)
def test_regions(build: Build, expect: list[str]) -> None:
    net = net_of(build)
    model = optimize(net)
    assert regions(model) == expect
    check(net, model)
