"""Activations and norms recognized from their formulas: where they fire, and where they must not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import Build, case, check_rewrites, rand

I64 = np.int64


def gelu_erf(order: int) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 6))
        gate = net.erf(x / math.sqrt(2)) + 1.0
        y = {0: x * 0.5 * gate, 1: x * (gate * 0.5), 2: (x * gate) * 0.5}[order]
        net.output("y", y)

    return build


def gelu_tanh(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    inner = (x + net.pow(x, 3.0) * 0.044715) * math.sqrt(2 / math.pi)
    net.output("y", x * 0.5 * (net.tanh(inner) + 1.0))


def gelu_wrong_number(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * 0.5 * (net.erf(x / 1.5) + 1.0))


def gelu_gate_used(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    gate = net.erf(x / math.sqrt(2)) + 1.0
    net.output("gate", gate)
    net.output("y", x * 0.5 * gate)


def silu(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(x))


def silu_other(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(net.exp(x)))


def quick_gelu(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(x * 1.702))


def hard_swish(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.clip(x + 3.0, np.float32(0), np.float32(6)) / 6.0)


def hard_swish_wrong(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.clip(x + 3.0, np.float32(0), np.float32(5)) / 6.0)


def mish(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.tanh(net.softplus(x)))


def mean_of(net: vt.Network, x: Any, axis: int = -1) -> Any:
    return net.reduce_mean(x, np.array([axis], I64))


def layer_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 5, 6))
        axis = 1 if variant == "axis" else -1
        d = x - mean_of(net, x, axis)
        var = mean_of(net, d * d if variant == "mul" else net.pow(d, 2.0), axis)
        root = net.sqrt(var + 1e-5)
        if variant == "used":
            net.output("root", root)
        y = d * net.reciprocal(root) if variant == "reciprocal" else d / root
        if variant == "axis":
            net.output("y", y * rand(6) + rand(6, seed=1))
        else:
            net.output("y", y * rand(6) + rand(6, seed=1) if variant != "bare" else y)

    return build


def rms_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 5, 6))
        square = net.pow(x, 2.0) if variant != "other" else net.pow(net.exp(x), 2.0)
        root = net.sqrt(mean_of(net, square) + 1e-6)
        y = x * net.reciprocal(root) if variant == "reciprocal" else x / root
        net.output("y", y * rand(6))

    return build


def group_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", (2, 6, 4, 4))
        y = net.reshape(x, np.array([2, 3, -1], I64))
        scale = np.ones(3, np.float32) * (2 if variant == "scaled" else 1)
        y = net.instance_normalization(y, scale, np.zeros(3, np.float32))
        y = net.reshape(y, np.array([2, 6, 4, 4], I64))
        net.output("y", y * rand(6, 1, 1) + rand(6, 1, 1, seed=1))

    return build


RECOGNITION = [
    *[case(f"gelu-erf-{i}", gelu_erf(i), {"Gelu": 1, "Erf": 0}) for i in range(3)],
    case("gelu-tanh", gelu_tanh, {"Gelu": 1, "Tanh": 0}),
    case("gelu-wrong-number", gelu_wrong_number, {"Gelu": 0, "Erf": 1}),
    case("gelu-gate-used", gelu_gate_used, {"Gelu": 0, "Erf": 1}),
    case("silu", silu, {"Swish": 1, "Sigmoid": 0}),
    case("silu-other", silu_other, {"Swish": 0, "Sigmoid": 1}),
    case("quick-gelu", quick_gelu, {"Swish": 1, "Sigmoid": 0}),
    case("hard-swish", hard_swish, {"HardSwish": 1, "Clip": 0}),
    case("hard-swish-wrong", hard_swish_wrong, {"HardSwish": 0, "Clip": 1}),
    case("mish", mish, {"Mish": 1, "Softplus": 0}),
    *[
        case(f"layer-norm-{v}", layer_norm(v), {"LayerNormalization": 1, "ReduceMean": 0})
        for v in ("pow", "mul", "reciprocal", "bare")
    ],
    case("layer-norm-axis", layer_norm("axis"), {"LayerNormalization": 0, "ReduceMean": 2}),
    case("layer-norm-used", layer_norm("used"), {"LayerNormalization": 0, "ReduceMean": 2}),
    case("rms-norm", rms_norm("div"), {"RMSNormalization": 1, "ReduceMean": 0}),
    case("rms-norm-reciprocal", rms_norm("reciprocal"), {"RMSNormalization": 1, "ReduceMean": 0}),
    case("rms-norm-other", rms_norm("other"), {"RMSNormalization": 0, "ReduceMean": 1}),
    case("group-norm", group_norm("plain"), {"GroupNormalization": 1, "InstanceNormalization": 0}),
    case("group-norm-scaled", group_norm("scaled"), {"GroupNormalization": 0, "InstanceNormalization": 1}),
]


@pytest.mark.parametrize("build, expect, options", RECOGNITION)
def test_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    check_rewrites(build, expect, options)
