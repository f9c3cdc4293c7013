"""Q/DQ contractions on the matrix unit: bytes in, bytes out, against the reference and against whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import venturi as vt
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.reference.interpreter import Interpreter
from venturi.engine.engine import Engine
from venturi.frontends.onnx_import import import_onnx

T = torch.Tensor
HOST = host()
pytestmark = pytest.mark.skipif(
    not isinstance(HOST, Isa) or not HOST.unit(quantized=True), reason="this CPU does not multiply bytes"
)
KINDS = {"u8": (TensorProto.UINT8, np.uint8), "s8": (TensorProto.INT8, np.int8)}


class Model:
    """An ONNX model with quantized tensors; `quantized` puts a Q/DQ pair behind a value."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind, self.rng = kind, np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, x: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(x), name))
        return name

    def add(self, op: str, inputs: list[str], **attrs: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{op}{len(self.nodes)}", **attrs))
        return out

    def numbers(self, scale: float, zero: int) -> list[str]:
        return [self.constant(np.float32(scale)), self.constant(KINDS[self.kind][1](zero))]

    def quantized(self, value: str, scale: float, zero: int) -> str:
        at = self.numbers(scale, zero)
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, *at]), *at])

    def weight(self, shape: tuple[int, ...], axis: int | None) -> str:
        stored = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        size = [] if axis is None else [shape[axis]]
        scale = self.constant(self.rng.uniform(0.001, 0.01, size).astype(np.float32))
        zero = self.constant(np.zeros(size, np.int8))
        return self.add("DequantizeLinear", [stored, scale, zero], **({} if axis is None else {"axis": axis}))

    def build(self, inputs: dict[str, Any], output: str, shape: Any, level: int = 0) -> tuple[Engine, Interpreter]:
        """(engine, what runs the model node by node)."""
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
        out = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "g", given, [out], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return vt.build(made, opt_level=level), Interpreter(import_onnx(made).graph)


def tactics(engine: Engine) -> list[str]:
    return [s.tactic for s in engine.plan.steps]


def agree(engine: Engine, plain: Interpreter, step: float, x: Any) -> None:
    """At most one step of the output's quantization apart, and that seldom."""
    (want,) = plain.run({"x": x}).values()
    got, want = np.asarray(engine(x)), np.asarray(want)
    assert got.shape == want.shape
    apart = np.abs(got - want) / step
    assert apart.max(initial=0.0) <= 1.01
    assert (apart > 0.01).mean() < 0.02


@pytest.mark.parametrize("kind, zero", [("u8", 0), ("u8", 117), ("s8", 0), ("s8", -9)])
@pytest.mark.parametrize(
    "shape, out, kernel, strides, pads",
    [
        ((2, 5, 9, 11), 19, 3, 1, [1, 1, 1, 1]),
        ((1, 64, 8, 8), 40, 1, 1, [0, 0, 0, 0]),
        ((1, 3, 17, 17), 33, 7, 2, [3, 3, 3, 3]),
        ((1, 70, 6, 5), 16, 3, 2, [0, 1, 2, 1]),
    ],
    ids=str,
)
def test_convolution(shape: Any, out: int, kernel: int, strides: int, pads: list[int], kind: str, zero: int) -> None:
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    bias = m.add(
        "DequantizeLinear",
        [m.constant(m.rng.integers(-4000, 4000, out).astype(np.int32)), m.constant(np.full(out, 1e-4, np.float32))],
        axis=0,
    )
    w = m.weight((out, shape[1], kernel, kernel), 0)
    y = m.add("Conv", [x, w, bias], kernel_shape=[kernel] * 2, strides=[strides] * 2, pads=pads)
    y = m.quantized(m.add("Relu", [y]), 0.05, zero)
    engine, plain = m.build({"x": shape}, y, None)
    assert "native-quantized" in tactics(engine)
    agree(engine, plain, 0.05, m.rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("kind, zero", [("u8", 30), ("s8", 5)])
def test_residuals_of_bytes(kind: str, zero: int) -> None:
    """Conv + dequantized residual, activation, one rounding; the residual's other reader keeps its own numbers."""
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    y = m.add("Conv", [x, m.weight((64, 64, 3, 3), 0)], kernel_shape=[3, 3], pads=[1] * 4)
    y = m.quantized(m.add("Relu", [m.add("Add", [y, x])]), 0.07, zero)
    engine, plain = m.build({"x": (1, 64, 7, 7)}, y, None)
    assert tactics(engine).count("native-quantized") == 1
    agree(engine, plain, 0.07, m.rng.standard_normal((1, 64, 7, 7)).astype(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 128])
def test_products(rows: int, transposed: bool) -> None:
    m = Model("u8")
    x = m.quantized("x", 0.02, 128)
    if transposed:
        y = m.add("Gemm", [x, m.weight((70, 100), 0)], transB=1)
    else:
        y = m.add(
            "Add", [m.add("MatMul", [x, m.weight((100, 70), 1)]), m.constant(m.rng.standard_normal(70, np.float32))]
        )
    engine, plain = m.build({"x": (rows, 100)}, m.quantized(y, 0.05, 100), None)
    assert "native-quantized" in tactics(engine)
    agree(engine, plain, 0.05, m.rng.standard_normal((rows, 100)).astype(np.float32))


def test_results_that_stay_numbers() -> None:
    """Without a QuantizeLinear behind it the sum leaves in fp32; whole numbers make it exact."""
    m = Model("s8")
    x = m.quantized("x", 1.0, 3)
    stored = m.rng.integers(-127, 128, (80, 48)).astype(np.int8)
    y = m.add("MatMul", [x, m.add("DequantizeLinear", [m.constant(stored), m.constant(np.float32(1.0))])])
    engine, _ = m.build({"x": (40, 80)}, y, None)
    assert "native-quantized" in tactics(engine)
    given = m.rng.integers(-120, 120, (40, 80)).astype(np.float32)
    want = given.astype(np.int64) @ stored.astype(np.int64)
    np.testing.assert_array_equal(np.asarray(engine(given)), want.astype(np.float32))


def test_moves_and_pools_stay_bytes() -> None:
    m = Model("u8")
    x = m.quantized("x", 0.02, 128)
    y = m.quantized(m.add("Conv", [x, m.weight((32, 8, 3, 3), 0)], kernel_shape=[3, 3]), 0.05, 100)
    y = m.add("MaxPool", [y], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = m.quantized(y, 0.05, 100)
    y = m.add("Conv", [y, m.weight((16, 32, 1, 1), 0)], kernel_shape=[1, 1])
    engine, plain = m.build({"x": (1, 8, 14, 14)}, m.quantized(y, 0.3, 128), None)
    ops = [s.ops for s in engine.plan.steps]
    assert ("MaxPool",) in ops
    assert sum("QuantizeLinear" in o for group in ops for o in group if o == "QuantizeLinear") == 3
    agree(engine, plain, 0.3, m.rng.standard_normal((1, 8, 14, 14)).astype(np.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_clamped_as_the_reference_does(value: float) -> None:
    m = Model("s8")
    y = m.add("Conv", [m.quantized("x", 0.02, 5), m.weight((32, 8, 3, 3), 0)], kernel_shape=[3, 3])
    engine, plain = m.build({"x": (1, 8, 6, 6)}, m.quantized(y, 0.05, 4), None)
    x = m.rng.standard_normal((1, 8, 6, 6)).astype(np.float32)
    x[0, 3, 2, 2] = value
    agree(engine, plain, 0.05, x)


def test_what_it_leaves_to_others() -> None:
    """Weights with a zero point, or scales along the inputs' axis, are not what the sums can be scaled by."""
    for axis, zero in ((1, 0), (0, 3)):
        m = Model("u8")
        stored = m.constant(m.rng.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8))
        scale = m.constant(m.rng.uniform(0.001, 0.01, 16).astype(np.float32))
        w = m.add("DequantizeLinear", [stored, scale, m.constant(np.full(16, zero, np.int8))], axis=axis)
        y = m.add("Conv", [m.quantized("x", 0.02, 128), w], kernel_shape=[1, 1])
        engine, plain = m.build({"x": (1, 16, 5, 5)}, m.quantized(y, 0.05, 100), None)
        assert "native-quantized" not in tactics(engine)
        agree(engine, plain, 0.05, m.rng.standard_normal((1, 16, 5, 5)).astype(np.float32))


@pytest.mark.parametrize("kind, zero", [("u8", 117), ("s8", -9)])
@pytest.mark.parametrize("channels, strides", [(5, 1), (40, 2), (64, 1)])
def test_depthwise(channels: int, strides: int, kind: str, zero: int) -> None:
    """What the padding stands for is zero, not the byte 0."""
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    bias = m.add(
        "DequantizeLinear",
        [
            m.constant(m.rng.integers(-99, 99, channels).astype(np.int32)),
            m.constant(np.full(channels, 1e-3, np.float32)),
        ],
        axis=0,
    )
    y = m.add(
        "Conv", [x, m.weight((channels, 1, 3, 3), 0), bias], kernel_shape=[3, 3], strides=[strides] * 2,
        pads=[1, 1, 1, 1], group=channels,
    )  # fmt: skip
    engine, plain = m.build({"x": (2, channels, 9, 11)}, m.quantized(m.add("Relu", [y]), 0.03, zero), None)
    assert "native-quantized-depthwise" in tactics(engine)
    agree(engine, plain, 0.03, m.rng.standard_normal((2, channels, 9, 11)).astype(np.float32))


def test_any_batch() -> None:
    m = Model("u8")
    y = m.add("Conv", [m.quantized("x", 0.02, 128), m.weight((32, 8, 3, 3), 0)], kernel_shape=[3, 3], pads=[1] * 4)
    engine, plain = m.build({"x": ("n", 8, 6, 6)}, m.quantized(y, 0.05, 128), None)
    assert "native-quantized" in tactics(engine)
    for n in (0, 1, 3, 20):
        x = m.rng.standard_normal((n, 8, 6, 6)).astype(np.float32)
        got = np.asarray(engine(x))
        assert got.shape == (n, 32, 6, 6)
        if n:
            agree(engine, plain, 0.05, x)


@pytest.mark.parametrize("kind, zero", [("u8", 30), ("s8", 5)])
@pytest.mark.parametrize("activation", [None, "Relu"])
def test_rounding_before_a_residual(kind: str, zero: int, activation: str | None) -> None:
    """As onnxruntime exports it: the sums are stored as bytes, then the residual is added; one kernel."""
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    y = m.add("Conv", [x, m.weight((70, 70, 3, 3), 0)], kernel_shape=[3, 3], pads=[1] * 4)
    y = m.add("Add", [m.quantized(y, 0.0313, zero), x])
    y = m.quantized(y if activation is None else m.add(activation, [y]), 0.0571, zero)
    engine, plain = m.build({"x": (1, 70, 7, 7)}, y, None)
    assert tactics(engine).count("native-quantized") == 1
    assert "Add" in next(s for s in engine.plan.steps if s.tactic == "native-quantized").ops
    agree(engine, plain, 0.0571, m.rng.standard_normal((1, 70, 7, 7)).astype(np.float32))


def test_roundings_that_no_kernel_knows_keep_their_own_steps() -> None:
    m = Model("u8")
    x = m.quantized("x", 0.02, 3)
    y = m.add("Relu", [m.add("Conv", [x, m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1])])
    y = m.quantized(m.add("Add", [m.quantized(y, 0.03, 0), x]), 0.05, 9)
    engine, plain = m.build({"x": (1, 64, 7, 7)}, y, None)
    assert tactics(engine).count("native-quantized") == 1
    assert "Add" not in next(s for s in engine.plan.steps if s.tactic == "native-quantized").ops
    agree(engine, plain, 0.05, m.rng.standard_normal((1, 64, 7, 7)).astype(np.float32))


def test_work_is_counted_as_of_real_numbers() -> None:
    m = Model("u8")
    y = m.add("Conv", [m.quantized("x", 0.02, 3), m.weight((16, 8, 3, 3), 0)], kernel_shape=[3, 3], pads=[1] * 4)
    engine, _ = m.build({"x": (2, 8, 5, 7)}, m.quantized(y, 0.05, 9), None, level=1)
    (step,) = [s for s in engine.plan.steps if "Conv" in s.ops]
    assert step.flops == 2 * (2 * 16 * 5 * 7) * (8 * 9)
