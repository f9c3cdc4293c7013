"""Linear layers on flattened rows become linear layers; where the reshapes do something else they stay."""

from __future__ import annotations

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import check, ops, optimize, rand, regions


@pytest.mark.parametrize("lead", [(2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_on_rows_takes_its_residual_along(lead: tuple[int, ...], trans: int, bias: bool) -> None:
    net = vt.Network("rows")
    x = net.input("x", (*lead, 8))
    w = rand(8, 8)
    y = net.gemm(net.reshape(x, np.array([-1, 8])), w, *([rand(8)] if bias else []), transB=trans)
    net.output("y", x + net.reshape(y, np.array([*lead, 8])))
    model = optimize(net)
    assert regions(model) == [f"gemm:MatMul+{'Add+' * bias}Add"]
    assert not {"Reshape", "Gemm"} & set(ops(model))
    check(net, model)


@pytest.mark.parametrize("case", ["other-shape", "wider", "shared", "alpha", "matrix-bias", "computed"])
def test_what_stays(case: str) -> None:
    net = vt.Network("rows")
    x = net.input("x", (2, 6, 8))
    flat = net.reshape(x, np.array([-1, 4 if case == "wider" else 8]))
    w = net.input("w", (8, 8)) if case == "computed" else rand(4 if case == "wider" else 8, 8)
    c = rand(12, 8) if case == "matrix-bias" else rand(8)
    y = net.gemm(flat, w, c, alpha=0.5 if case == "alpha" else 1.0)
    net.output("y", net.reshape(y, np.array([3, -1, 8] if case == "other-shape" else [2, -1, 8])))
    if case == "shared":
        net.output("rows", net.neg(y))
    model = optimize(net)
    assert ops(model)["Gemm"] == 1
    check(net, model)


def test_several_reshapes_in_front_are_one() -> None:
    net = vt.Network("rows")
    x = net.input("x", (2, 6, 8))
    heads = net.reshape(x, np.array([2, 6, 4, 2]))
    y = net.gemm(net.reshape(heads, np.array([-1, 8])), rand(8, 8))
    net.output("y", net.relu(net.reshape(y, np.array([2, 6, 8]))))
    model = optimize(net)
    assert regions(model) == ["gemm:MatMul+Relu"]
    check(net, model)
