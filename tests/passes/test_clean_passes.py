"""Constants, identities, shapes, types taken from another value: where they fire, and where they must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import Build, case, check_rewrites, rand

I64 = np.int64


def fold(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", x + net.exp(net.constant(rand(3))))


def fold_not_inputs(net: vt.Network) -> None:
    net.output("y", net.exp(net.input("x", (2, 3))))


def fold_shape(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.reshape(x, net.concat(net.shape(x)[0:1], np.array([-1], I64), axis=0)))


def fold_random(net: vt.Network) -> None:
    net.output("y", net.input("x", (4,)) + net.op("RandomNormal", shape=[4], seed=1.0))


def fold_too_large(net: vt.Network) -> None:
    """A constant that would blow a few bytes up to 400 KB stays an operator."""
    net.output("y", net.input("x", (1,)) + net.expand(net.constant(rand(1)), np.array([100000], I64)))


def add_zero(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.relu((x + 0.0 * 1) * 1.0))


def add_zero_broadcasts(net: vt.Network) -> None:
    """Adding zeros of a larger shape is how models expand: it must stay."""
    net.output("y", net.relu(net.input("x", (1, 3)) + np.zeros((4, 3), np.float32)))


def identity_chain(net: vt.Network) -> None:
    net.output("y", net.relu(net.identity(net.identity(net.input("x", (2,))))))


def identity_of_input_to_output(net: vt.Network) -> None:
    net.output("y", net.input("x", (2,)))


def transposes_cancel(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.transpose(net.transpose(x, perm=[2, 0, 1]), perm=[1, 2, 0])))


def transposes_merge(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.transpose(net.transpose(x, perm=[2, 0, 1]), perm=[2, 1, 0])))


def transposes_used_between(net: vt.Network) -> None:
    t = net.transpose(net.input("x", (2, 3, 4)), perm=[2, 0, 1])
    net.output("t", t)
    net.output("y", net.relu(net.transpose(t, perm=[1, 2, 0])))


def casts_narrow_between(net: vt.Network) -> None:
    """fp32 → int32 → fp32 rounds: it is not nothing."""
    net.output("y", net.relu(net.cast(net.cast(net.input("x", (3,)), to=6), to=1)))


def casts_widen_between(net: vt.Network) -> None:
    net.output("y", net.relu(net.cast(net.cast(net.input("x", (3,)), to=11), to=1)))


def reshapes_merge(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.reshape(net.reshape(x, np.array([6, 4], I64)), np.array([4, 6], I64))))


def duplicates(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.exp(x) + net.relu(net.exp(x)))


def duplicates_differ(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.leaky_relu(x, alpha=0.1) + net.leaky_relu(x, alpha=0.2))


def dead(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.exp(x)
    net.output("y", net.relu(x))


BASICS = [
    case("fold", fold, {"Exp": 0, "Add": 1}),
    case("fold-not-inputs", fold_not_inputs, {"Exp": 1}),
    case("fold-shape", fold_shape, {"Shape": 0, "Concat": 0, "Reshape": 1}),
    case("fold-random", fold_random, {"RandomNormal": 1}, meaning=False),
    case("fold-too-large", fold_too_large, {"Expand": 1}),
    case("add-zero", add_zero, {"Mul": 0}),
    case("add-zero-broadcasts", add_zero_broadcasts, {"Add": 1}),
    case("identity-chain", identity_chain, {"Identity": 0, "Relu": 1}),
    case("identity-io", identity_of_input_to_output, {"Identity": 1}),
    case("transposes-cancel", transposes_cancel, {"Transpose": 0}),
    case("transposes-merge", transposes_merge, {"Transpose": 1}),
    case("transposes-used", transposes_used_between, {"Transpose": 1}),
    case("casts-narrow", casts_narrow_between, {"Cast": 2}),
    case("casts-widen", casts_widen_between, {"Cast": 0}),
    case("reshapes", reshapes_merge, {"Reshape": 1}),
    case("duplicates", duplicates, {"Exp": 1}),
    case("duplicates-differ", duplicates_differ, {"LeakyRelu": 2}),
    case("dead", dead, {"Exp": 0}),
]


def cast_like(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 3, 6, 6))
        if variant == "bias":
            bias = net.expand(net.cast_like(np.float64(0.5), x), np.array([4], I64))
            net.output("y", net.conv(x, rand(4, 3, 3, 3), bias))
        else:
            other = net.input("i", ("n", 3, 6, 6), "int32" if variant == "integer" else "float32")
            net.output("y", net.cast_like(other, x) * x)

    return build


CASTS = [
    case("cast-like-bias", cast_like("bias"), {"CastLike": 0, "Cast": 0, "Expand": 0, "Conv": 1}),
    case("cast-like-integer", cast_like("integer"), {"CastLike": 0, "Cast": 1}),
    case("cast-like-same", cast_like("same"), {"CastLike": 0, "Cast": 0}),
]


@pytest.mark.parametrize("build, expect, options", [*BASICS, *CASTS])
def test_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    check_rewrites(build, expect, options)
