"""Attention recognized, products fused side by side: where it happens, and where it must not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import Build, case, check_rewrites, rand

I64 = np.int64


def attention(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        heads = 4
        q = net.input("q", ("b", heads, "s", 8))
        kv = 2 if variant == "gqa" else heads
        k, v = net.input("k", ("b", kv, "t", 8)), net.input("v", ("b", kv, "t", 8))
        if variant == "gqa":
            k, v = (_repeat(net, t, heads // kv) for t in (k, v))
        if variant == "flat":
            raise AssertionError
        kt = net.transpose(k, perm=[0, 1, 3, 2])
        scores = (q * 0.5) @ (kt * 0.5) if variant == "split-scale" else (q @ kt) / math.sqrt(8)
        if variant == "mask":
            scores = scores + net.input("m", ("b", 1, "s", "t"))
        if variant == "used":
            net.output("scores", scores)
        p = net.softmax(scores, axis=2 if variant == "axis" else -1)
        if variant == "guard":
            p = net.where(net.is_nan(p), np.float32(0), p)
        if variant == "probabilities":
            net.output("p", p)
        net.output("y", p @ v)

    return build


def _repeat(net: vt.Network, x: Any, groups: int) -> Any:
    """[b, g, t, d] → [b, g * groups, t, d], as transformers does it; sizes are fixed here."""
    wide = net.expand(net.unsqueeze(x, np.array([2], I64)), np.array([1, 1, groups, 1, 1], I64))
    return net.reshape(wide, np.array([0, 4, -1, 8], I64))


def attention_3d(net: vt.Network) -> None:
    q, k, v = (net.input(n, (6, 5, 8)) for n in "qkv")
    scores = q @ net.transpose(k, perm=[0, 2, 1]) * 0.3
    net.output("y", net.softmax(scores, axis=-1) @ v)


def qkv(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 3, 8))
        outs = []
        for i in range(3):
            y = x @ rand(8, 4 + i, seed=i)
            if variant == "bias" or (variant == "mixed" and i == 0):
                y = y + rand(4 + i, seed=10 + i)
            outs.append(y)
        if variant == "output":
            net.output("first", outs[0])
        for i, y in enumerate(outs):
            net.output(f"y{i}", net.relu(y))

    return build


TRANSFORMER = [
    *[
        case(f"attention-{v}", attention(v), {"Attention": 1, "Softmax": 0})
        for v in ("plain", "split-scale", "mask", "guard")
    ],
    case("attention-gqa", attention("gqa"), {"Attention": 1, "Softmax": 0}),
    *[case(f"attention-{v}", attention(v), {"Attention": 0, "Softmax": 1}) for v in ("used", "axis", "probabilities")],
    case("attention-3d", attention_3d, {"Attention": 1, "Softmax": 0}),
    case("qkv", qkv("plain"), {"MatMul": 1, "Split": 1}),
    case("qkv-bias", qkv("bias"), {"MatMul": 1, "Split": 1, "Add": 1}),
    case("qkv-mixed", qkv("mixed"), {"Split": 0, "MatMul": 3}),
    case("qkv-output", qkv("output"), {"MatMul": 2, "Split": 1}),
]


@pytest.mark.parametrize("build, expect, options", TRANSFORMER)
def test_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    check_rewrites(build, expect, options)
