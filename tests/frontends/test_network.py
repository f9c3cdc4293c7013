"""The layer-by-layer builder: shapes at the call, operators by any spelling, errors that say what to do."""

from __future__ import annotations

import doctest

import numpy as np
import onnx_ir as ir
import pytest

import venturi as vt
import venturi.frontends.network
from venturi.ops.table import OPS, load_all


def test_shapes_are_known_at_the_call() -> None:
    net = vt.Network()
    x = net.input("x", ("n", 3, 32, 32))
    y = net.conv(x, np.zeros((8, 3, 3, 3), np.float32), strides=[2, 2], pads=[1, 1, 1, 1])
    assert y.shape == ("n", 8, 16, 16)
    assert net.global_average_pool(y).shape == ("n", 8, 1, 1)
    assert (y * 2 + 1).shape == ("n", 8, 16, 16)
    assert net.reduce_mean(y, np.array([2, 3], np.int64), keepdims=0).shape == ("n", 8)
    assert y[0, :, 2:4].shape == (8, 2, 16)
    assert net.cast(y, to=10).dtype == "float16"


def test_arithmetic_follows_numpy() -> None:
    net = vt.Network()
    a, b = net.input("a", (2, 3)), net.input("b", (3,))
    outs = {
        "s": a + b, "d": a - b, "p": a * b, "q": a / b, "w": a**2.0, "n": -a, "m": a @ np.ones((3, 2), np.float32),
        "r": 1 - a, "i": 2 / b, "lt": a < b, "gt": a > 0.5, "sl": a[:, ::2], "neg": a[-1],
    }  # fmt: skip
    for name, value in outs.items():
        net.output(name, value)
    x, y = np.array([[1, 2, 3], [4, 5, 6]], np.float32), np.array([2, 4, 8], np.float32)
    got = vt.build(net, opt_level=0).run({"a": x, "b": y})
    want = {
        "s": x + y, "d": x - y, "p": x * y, "q": x / y, "w": x**2, "n": -x, "m": x @ np.ones((3, 2)), "r": 1 - x,
        "i": 2 / y, "lt": x < y, "gt": x > 0.5, "sl": x[:, ::2], "neg": x[-1],
    }  # fmt: skip
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6)


def test_every_standard_operator_is_a_method() -> None:
    load_all()
    net = vt.Network()
    for domain, name in OPS:
        if domain == "":
            assert callable(getattr(net, name.lower())), name
    assert callable(net.layer_normalization)
    assert callable(net.max_pool)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda n, x: n.matmul(x, np.ones((4, 5), np.float32)), vt.ShapeError, "MatMul refuses (x: [n, 3]"),
        (lambda n, x: n.cast(x, np.float32), vt.ModelError, "attributes are given by name"),
        (lambda n, x: n.cast(x, to="float31"), vt.ShapeError, "unknown dtype 'float31'"),
        (lambda n, x: x + np.ones(4, np.float32), vt.ShapeError, "Add refuses"),
        (lambda n, x: n.softmax(x, axes=1), vt.ModelError, "Did you mean 'axis'"),
        (lambda n, x: n.op("Rleu", x), vt.ModelError, "Did you mean 'Relu'"),
        (lambda n, x: n.input("x", (1,)), vt.ModelError, "input 'x' already"),
        (lambda n, x: n.input("z", (1,), "flaot32"), vt.ShapeError, "Did you mean 'float32'"),
        (lambda n, x: n.to_model(), vt.ModelError, "no output"),
        (lambda n, x: vt.Network().relu(x), vt.ModelError, "another network"),
        (lambda n, x: x[np.array([0])], vt.ShapeError, "slices and integers"),
        (lambda n, x: n.rellu, AttributeError, "Did you mean 'relu'"),
    ],
)
def test_errors(build, error, words) -> None:  # type: ignore[no-untyped-def]
    net = vt.Network()
    x = net.input("x", ("n", 3))
    with pytest.raises(error) as found:
        build(net, x)
    assert words in str(found.value)


def test_optional_inputs_by_name() -> None:
    net = vt.Network()
    x = net.input("x", (2, 3))
    net.output("y", net.clip(x, high=np.float32(0.5)))
    got = vt.build(net, opt_level=0)(np.array([[-1, 0, 1], [2, 0.2, 0.7]], np.float32))
    np.testing.assert_allclose(got, [[-1, 0, 0.5], [0.5, 0.2, 0.5]])


def test_docstring_examples_run() -> None:
    assert doctest.testmod(venturi.frontends.network).failed == 0
    assert doctest.testmod(venturi.frontends.network).attempted > 0


@pytest.mark.parametrize("to", [np.float16, "float16", ir.DataType.FLOAT16, 10])
def test_types_as_attributes(to) -> None:
    net = vt.Network("cast")
    y = net.cast(net.input("x", (2, 3)), to=to)
    assert y.dtype == "float16"
