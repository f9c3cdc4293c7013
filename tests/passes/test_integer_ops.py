"""Operators on integers become operators on numbers: which do, with what results, and which must stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import venturi as vt
from tests.passes.harness import ops
from tests.passes.test_quantized import Sketch
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext

MS = "com.microsoft"


class Integers(Sketch):
    """`x` is quantized in front, the result dequantized behind."""

    def small(self, value: str = "x", scale: float = 0.02, zero: int = 9) -> list[str]:
        at = self.numbers(scale, zero)
        return [self.add("QuantizeLinear", [value, *at]), *at]

    def weights_of(self, shape: tuple[int, ...], scales: int | None, zero: int = 0) -> list[str]:
        stored = self.constant(self.rng.integers(-100, 101, shape).astype(np.int8))
        size = [] if scales is None else [scales]
        scale = self.constant(self.rng.uniform(0.001, 0.01, size).astype(np.float32))
        return [stored, scale, self.constant(np.full(size, zero, np.int8))]

    def result(self, op: str, inputs: list[str], out: tuple[float, int], domain: str = "", **attrs: Any) -> str:
        at = self.numbers(*out)
        name = self.add(op, [*inputs[:-1], *at] if inputs[-1] == "OUT" else inputs, domain=domain, **attrs)
        return self.add("DequantizeLinear", [name, *at])

    def optimized(self, shape: Any, output: str, step: float | None = None) -> Any:
        """The optimized model; its results are those of the model as it was, to one `step` of a quantized output."""
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        out = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "g", given, out, self.weights)
        sets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        made = helper.make_model(graph, opset_imports=sets, ir_version=10)
        before, after = import_onnx(made), import_onnx(made)
        run_pipeline(after, PassContext(fuses_quantized=False))
        x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        (want,), (got,) = Interpreter(before.graph).run(x).values(), Interpreter(after.graph).run(x).values()
        if step is None:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            return after
        apart = np.abs(np.asarray(got) - np.asarray(want))
        assert apart.max() <= step * 1.01
        assert (apart > step / 100).mean() < 0.03
        return after


def conv(m: Integers, scales: int | None, bias: bool) -> str:
    x, w = m.small(), m.weights_of((12, 8, 3, 3), scales)
    extra = [m.constant(m.rng.integers(-500, 500, 12).astype(np.int32))] if bias else []
    inputs = [*x, *w, *m.numbers(0.05, 100), *extra]
    y = m.add("QLinearConv", inputs, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    return m.add("DequantizeLinear", [y, *m.numbers(0.05, 100)])


def matmul(m: Integers, scales: int | None) -> str:
    return m.result("QLinearMatMul", [*m.small(), *m.weights_of((8, 5), scales), "OUT"], (0.05, 100))


def gemm(m: Integers, trans: int) -> str:
    bias = m.constant(m.rng.integers(-500, 500, 5).astype(np.int32))
    w = m.weights_of((5, 8) if trans else (8, 5), 5)
    return m.result("QGemm", [*m.small(), *w, bias, "OUT"], (0.05, 100), MS, transB=trans)


def pair(m: Integers, op: str) -> str:
    return m.result(op, [*m.small(), *m.small(scale=0.03, zero=50), "OUT"], (0.06, 70), MS)


def one(m: Integers, op: str, **attrs: Any) -> str:
    return m.result(op, [*m.small(), "OUT"], (0.01, 20), MS, **attrs)


def concat(m: Integers) -> str:
    at = m.numbers(0.05, 60)
    y = m.add("QLinearConcat", [*at, *m.small(), *m.small(scale=0.03, zero=50)], domain=MS, axis=1)
    return m.add("DequantizeLinear", [y, *at])


IMAGE, ROWS = (2, 8, 7, 7), (6, 8)
CASES: list[tuple[str, Any, float, Callable[[Integers], str]]] = [
    ("QLinearConv", IMAGE, 0.05, lambda m: conv(m, 12, True)),
    ("QLinearConv", IMAGE, 0.05, lambda m: conv(m, None, False)),
    ("QLinearMatMul", ROWS, 0.05, lambda m: matmul(m, 5)),
    ("QLinearMatMul", (3, 6, 8), 0.05, lambda m: matmul(m, None)),
    ("QGemm", ROWS, 0.05, lambda m: gemm(m, 0)),
    ("QGemm", ROWS, 0.05, lambda m: gemm(m, 1)),
    ("QLinearAdd", IMAGE, 0.06, lambda m: pair(m, "QLinearAdd")),
    ("QLinearMul", IMAGE, 0.06, lambda m: pair(m, "QLinearMul")),
    ("QLinearSigmoid", IMAGE, 0.01, lambda m: one(m, "QLinearSigmoid")),
    ("QLinearLeakyRelu", IMAGE, 0.01, lambda m: one(m, "QLinearLeakyRelu", alpha=0.2)),
    ("QLinearGlobalAveragePool", IMAGE, 0.01, lambda m: one(m, "QLinearGlobalAveragePool")),
    ("QLinearConcat", IMAGE, 0.05, concat),
]


@pytest.mark.parametrize("op, shape, step, make", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_operators_with_the_numbers_of_their_tensors(op: str, shape: Any, step: float, make: Any) -> None:
    m = Integers("u8")
    found = ops(m.optimized(shape, make(m), step))
    assert found[op] == 0, "it would go to the reference"


def product(m: Integers, op: str = "MatMulInteger", scales: int | None = 5, **case: bool) -> str:
    """As onnxruntime's quantize_dynamic writes it."""
    small, scale, zero = (f"q{i}" for i in range(3))
    m.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], [small, scale, zero], name="dynamic"))
    shape, attrs = ((8, 5), {}) if op == "MatMulInteger" else ((5, 8, 3, 3), {"kernel_shape": [3, 3]})
    w, w_scale, w_zero = m.weights_of(shape, scales if op == "MatMulInteger" else None, 3 if case.get("zero") else 0)
    whole = m.add(op, [small, w, zero, w_zero], **attrs)
    real = m.add("Cast", [whole], to=TensorProto.FLOAT)
    if case.get("other_scale"):
        scale = m.constant(np.float32(0.01))
    y = m.add("Mul", [real, m.add("Mul", [scale, w_scale])])
    if case.get("twice"):
        y = m.add("Add", [y, m.add("Neg", [real])])
    return m.add("Add", [y, m.constant(m.rng.standard_normal(5).astype(np.float32))]) if op == "MatMulInteger" else y


@pytest.mark.parametrize("scales", [None, 5])
@pytest.mark.parametrize("shape", [ROWS, (2, 3, 8)])
@pytest.mark.parametrize("zero", [False, True])
def test_products_with_scales_of_run_time(scales: int | None, shape: Any, zero: bool) -> None:
    m = Integers("u8")
    found = ops(m.optimized(shape, product(m, scales=scales, zero=zero)))
    assert found["MatMulInteger"] == 0
    assert found["MatMul"] == 1


def test_a_convolution_with_scales_of_run_time() -> None:
    m = Integers("u8")
    found = ops(m.optimized(IMAGE, product(m, "ConvInteger")))
    assert found["ConvInteger"] == 0
    assert found["Conv"] == 1


@pytest.mark.parametrize("case", ["other_scale", "twice"])
def test_products_that_must_stay(case: str) -> None:
    """The scale is not that of the operand; the unscaled sums have another reader."""
    m = Integers("u8")
    assert ops(m.optimized(ROWS, product(m, **{case: True})))["MatMulInteger"] == 1


def test_numbers_that_are_computed_stay() -> None:
    """A row of scales that only run time knows cannot lie along an axis."""
    m = Integers("u8")
    x, (w, _, zero) = m.small(), m.weights_of((8, 5), 5)
    scale = m.add("Exp", [m.add("ReduceMean", ["x", m.constant(np.array([0], np.int64))], keepdims=0)])
    scale = m.add("Slice", [scale, m.constant(np.array([0])), m.constant(np.array([5]))])
    y = m.result("QLinearMatMul", [*x, w, scale, zero, "OUT"], (5.0, 100))
    assert ops(m.optimized(ROWS, y, 5.0))["QLinearMatMul"] == 1


@pytest.mark.parametrize("op, inputs", [("DynamicQuantizeMatMul", 5), ("MatMulIntegerToFloat", 7)])
def test_fused_operators_of_onnxruntime(op: str, inputs: int) -> None:
    m = Integers("u8")
    w, scale, zero = m.weights_of((8, 5), 5)
    bias = m.constant(m.rng.standard_normal(5).astype(np.float32))
    if op == "DynamicQuantizeMatMul":
        y = m.add(op, ["x", w, scale, zero, bias], domain=MS)
    else:
        small, x_scale, x_zero = m.small()
        y = m.add(op, [small, w, x_scale, scale, x_zero, zero, bias], domain=MS)
    assert ops(m.optimized(ROWS, y))[op] == 0


@pytest.mark.parametrize("form", ["dynamic", "operators"])
def test_exports_of_onnxruntime(form: str, tmp_path: Path) -> None:
    """The same file quantized by onnxruntime, run by it and by us."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    rng = np.random.default_rng(0)
    net = vt.Network("small")
    x = net.input("x", ("n", 3, 16, 16))
    y = net.relu(net.conv(x, rng.standard_normal((8, 3, 3, 3)).astype(np.float32) / 5, pads=[1, 1, 1, 1]))
    y = net.reshape(net.max_pool(y, kernel_shape=[2, 2], strides=[2, 2]), np.array([0, -1]))
    y = net.relu(y @ rng.standard_normal((512, 64)).astype(np.float32) / 20)
    net.output("y", y @ rng.standard_normal((64, 10)).astype(np.float32))
    source, made = tmp_path / "m.onnx", tmp_path / "q.onnx"
    proto = ir.to_proto(net.to_model())
    proto.ir_version = 10
    proto.opset_import[0].version = 17  # these operators did not change since; onnxruntime lags behind
    onnx.save(proto, source)
    data = [{"x": rng.standard_normal((4, 3, 16, 16)).astype(np.float32)} for _ in range(4)]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self) -> Any:
            return next(self.left, None)

    if form == "dynamic":
        quantize_dynamic(source, made)
    else:
        quantize_static(source, made, Reader(), quant_format=QuantFormat.QOperator)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (want,) = ort.InferenceSession(str(made), options, providers=["CPUExecutionProvider"]).run(None, data[0])
    engine = vt.build(made, opt_level=0, profiles=vt.Profile(x=(4, 3, 16, 16)))
    integers = {"MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "QGemm"}
    assert not integers & {o for s in engine.plan.steps for o in s.ops}
    np.testing.assert_allclose(engine(data[0]["x"]), want, atol=0.02 * np.abs(want).max())
