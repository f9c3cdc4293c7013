"""1-D convolutions become 2-D ones of one row, with what follows them; reshapes are left at the ends only."""

from __future__ import annotations

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import check, net_of, ops, optimize, rand, regions
from venturi.ir.build import rank
from venturi.ir.region import members


def sound(length: int | str = 20, **attrs: object) -> vt.Network:
    def build(net: vt.Network) -> None:
        x = net.input("x", (2, 8, length))
        y = net.gelu(net.conv(x, rand(16, 8, 3), rand(16), pads=[1, 1], **attrs))
        z = net.relu(net.conv(y, rand(16, 16, 3, seed=1), rand(16, seed=2), pads=[2, 0]) + y)
        net.output("z", net.conv(z, rand(4, 4, 5, seed=3), group=4, dilations=[2]))

    return net_of(build)


@pytest.mark.parametrize("length", [20, "n"])
def test_a_chain_is_reshaped_at_its_ends_only(length: int | str) -> None:
    net = sound(length)
    model = optimize(net)
    assert {rank(m.inputs[0]) for n in model.graph for m in members(n) if m.op_type == "Conv"} == {4}
    found = ops(model)
    assert found["Unsqueeze"] + found["Squeeze"] + found["Reshape"] == 2
    assert regions(model) == ["conv:Conv+Gelu", "conv:Conv+Add+Relu"]
    check(net, model, rtol=2e-5, x=rand(2, 8, 20, seed=9))


@pytest.mark.parametrize("attrs", [dict(strides=[2]), dict(auto_pad="VALID"), dict(auto_pad="SAME_UPPER", strides=[3])])
def test_attributes_keep_their_meaning(attrs: dict[str, object]) -> None:
    def build(net: vt.Network) -> None:
        net.output("y", net.sigmoid(net.conv(net.input("x", (1, 6, 17)), rand(4, 3, 4), group=2, **attrs)))

    net = net_of(build)
    model = optimize(net)
    assert regions(model) == ["conv:Conv+Sigmoid"]
    check(net, model)


def test_operands_that_are_read_elsewhere_stay_as_they_are() -> None:
    def build(net: vt.Network) -> None:
        x = net.input("x", (1, 4, 9))
        y = net.conv(x, rand(4, 4, 3), pads=[1, 1])
        net.output("y", y)
        net.output("z", net.softmax(net.relu(y), axis=-1))

    net = net_of(build)
    model = optimize(net)
    assert ops(model)["Conv"] == 1
    check(net, model)


@pytest.mark.parametrize("what", ["weights", "rank"])
def test_others_are_left_alone(what: str) -> None:
    def build(net: vt.Network) -> None:
        if what == "weights":
            net.output("y", net.conv(net.input("x", (1, 4, 9)), net.input("w", (4, 4, 3))))
        else:
            net.output("y", net.conv(net.input("x", (1, 4, 9, 9)), rand(4, 4, 3, 3)))

    model = optimize(net_of(build))
    assert not {"Squeeze", "Unsqueeze", "Reshape"} & set(ops(model))
    assert np.all([n.op_type == "Conv" for n in model.graph])
