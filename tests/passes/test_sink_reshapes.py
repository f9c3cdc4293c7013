"""Reshapes between a product and its activation move out of the way, and only those."""

from __future__ import annotations

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import check, net_of, ops, optimize, rand, regions


def reshaped(variant: str) -> vt.Network:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 8))
        y = x * 2.0 if variant == "no product" else x @ rand(8, 8)
        if variant == "bias":
            y = y + rand(8, seed=1)
        shaped = net.reshape(y, np.array([-1, 2, 4]))
        net.output("z", shaped * rand(2, 1) if variant == "binary" else net.gelu(shaped))
        if variant == "read twice":
            net.output("also", shaped * 3.0)
        if variant == "product read twice":
            net.output("also", y * 3.0)

    return net_of(build)


@pytest.mark.parametrize("variant,region", [("plain", "gemm:MatMul+Gelu"), ("bias", "gemm:MatMul+Add+Gelu")])
def test_moves_behind_the_activation(variant: str, region: str) -> None:
    net = reshaped(variant)
    model = optimize(net)
    assert regions(model) == [region]
    assert ops(model)["Reshape"] == 1
    check(net, model, rtol=2e-5)


@pytest.mark.parametrize("variant", ["no product", "binary", "read twice", "product read twice"])
def test_stays(variant: str) -> None:
    net = reshaped(variant)
    model = optimize(net)
    assert not any("Gelu" in r and "MatMul" in r for r in regions(model))
    assert ops(model)["Reshape"] == 1
    check(net, model, rtol=2e-5)


def test_the_reshape_of_a_reshape_is_merged() -> None:
    def build(net: vt.Network) -> None:
        x = net.input("x", (6, 8))
        hidden = net.gelu(net.reshape(x @ rand(8, 12), np.array([2, 3, 12])))
        net.output("z", net.reshape(hidden, np.array([6, 12])) @ rand(12, 4))

    net = net_of(build)
    model = optimize(net)
    assert ops(model)["Reshape"] == 0
    check(net, model, rtol=2e-5)
