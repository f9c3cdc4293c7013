"""Quantized models: what becomes one Region, what works on bytes, and what must stay as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.backends.cpu.test_native_quantized import Model
from tests.passes.harness import ops, regions
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext


class Sketch(Model):
    def optimize(self, shape: Any, outputs: list[str], fuses: bool = True, context: PassContext | None = None) -> Any:
        """The optimized model; its results are those of the model as it was, to one step of quantization."""
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        out = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", given, out, self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        before, after = import_onnx(made), import_onnx(made)
        run_pipeline(after, context or PassContext(fuses_quantized=fuses))
        x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        want, got = Interpreter(before.graph).run(x), Interpreter(after.graph).run(x)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)
        return after

    def conv(self, x: str, out: int, channels: int, **attrs: Any) -> str:
        return self.add("Conv", [x, self.weight((out, channels, 1, 1), 0)], kernel_shape=[1, 1], **attrs)


SHAPE = (1, 8, 6, 6)
PLAIN = "quantized:DequantizeLinear+DequantizeLinear+Conv+QuantizeLinear"


def test_a_contraction_with_both_ends() -> None:
    m = Sketch("u8")
    y = m.quantized(m.add("Relu", [m.conv(m.quantized("x", 0.02, 7), 16, 8)]), 0.05, 9)
    made = m.optimize(SHAPE, [y])
    assert regions(made) == ["quantized:DequantizeLinear+DequantizeLinear+Conv+Relu+QuantizeLinear"]


def test_only_where_kernels_take_integers() -> None:
    m = Sketch("u8")
    y = m.quantized(m.conv(m.quantized("x", 0.02, 7), 16, 8), 0.05, 9)
    assert not any(r.startswith("quantized") for r in regions(m.optimize(SHAPE, [y], fuses=False)))


def test_readers_of_one_dequantized_value_get_their_own() -> None:
    m = Sketch("u8")
    x = m.quantized("x", 0.02, 7)
    a = m.quantized(m.conv(x, 8, 8), 0.05, 9)
    b = m.quantized(m.conv(x, 8, 8), 0.06, 1)
    total = m.quantized(m.add("Add", [a, b]), 0.1, 4)
    made = m.optimize(SHAPE, [total, x])
    found = regions(made)
    assert found.count(PLAIN) == 2
    assert sum(r.startswith("pointwise") and "Add+QuantizeLinear" in r for r in found) == 1
    assert ops(made)["QuantizeLinear"] == 4, "one for x, two for the branches, one for the sum"


def test_a_sum_with_two_readers_is_not_rounded_inside() -> None:
    m = Sketch("u8")
    y = m.conv(m.quantized("x", 0.02, 7), 16, 8)
    made = m.optimize(SHAPE, [m.quantized(y, 0.05, 9), m.add("Neg", [y])])
    assert "quantized:DequantizeLinear+DequantizeLinear+Conv" in regions(made)


@pytest.mark.parametrize("case", ["scales", "bytes"])
def test_other_numbers_stay_alone(case: str) -> None:
    """An image with a scale a channel; weights of unsigned bytes."""
    m = Sketch("u8")
    if case == "scales":
        at = [m.constant(np.full(8, 0.02, np.float32)), m.constant(np.full(8, 3, np.uint8))]
        x = m.add("DequantizeLinear", [m.add("QuantizeLinear", ["x", *at], axis=1), *at], axis=1)
        y = m.conv(x, 16, 8)
    else:
        stored = m.constant(m.rng.integers(0, 255, (16, 8, 1, 1)).astype(np.uint8))
        w = m.add("DequantizeLinear", [stored, m.constant(np.float32(0.01)), m.constant(np.uint8(128))])
        y = m.add("Conv", [m.quantized("x", 0.02, 7), w], kernel_shape=[1, 1])
    assert not any(r.startswith("quantized") for r in regions(m.optimize(SHAPE, [m.quantized(y, 0.05, 9)])))


def pooled(scale: float, zero: int) -> Any:
    """MaxPool between Q/DQ pairs; the second with these numbers."""
    m = Sketch("u8")
    y = m.add("MaxPool", [m.quantized("x", 0.02, 7)], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return ops(m.optimize(SHAPE, [m.quantized(y, scale, zero)]))


def test_pools_work_on_bytes_and_the_pair_behind_them_goes() -> None:
    found = pooled(0.02, 7)
    assert (found["QuantizeLinear"], found["MaxPool"], found["DequantizeLinear"]) == (1, 1, 1)


@pytest.mark.parametrize("scale, zero", [(0.021, 7), (0.02, 8)])
def test_a_pair_with_other_numbers_stays(scale: float, zero: int) -> None:
    assert pooled(scale, zero)["QuantizeLinear"] == 2


def test_a_quantized_graph_output_keeps_its_node() -> None:
    m = Sketch("u8")
    at = m.numbers(0.02, 7)
    q = m.add("QuantizeLinear", ["x", *at])
    y = m.add("QuantizeLinear", [m.add("DequantizeLinear", [q, *at]), *at])
    z = m.add("DequantizeLinear", [y, *at])
    made = m.optimize(SHAPE, [z])
    assert ops(made)["QuantizeLinear"] == 1


def test_rounding_goes_in_front_of_a_pooling() -> None:
    m = Sketch("s8")
    y = m.add("MaxPool", [m.add("Relu", [m.conv(m.quantized("x", 0.02, 7), 16, 8)])], kernel_shape=[2, 2])
    made = m.optimize(SHAPE, [m.quantized(y, 0.05, 9)])
    assert [n.op_type for n in made.graph] == ["QuantizeLinear", "Region", "MaxPool", "DequantizeLinear"]


@pytest.mark.parametrize("case", ["may be NaN", "another reader", "an average"])
def test_rounding_stays_behind_a_pooling(case: str) -> None:
    m = Sketch("s8")
    x = "x" if case == "may be NaN" else m.conv(m.quantized("x", 0.02, 7), 16, 8)
    y = m.add("AveragePool" if case == "an average" else "MaxPool", [x], kernel_shape=[2, 2])
    more = [m.add("Sigmoid", [y])] if case == "another reader" else []
    made = m.optimize(SHAPE, [m.quantized(y, 0.05, 9), *more])
    pool = next(n for n in made.graph if n.op_type in ("MaxPool", "AveragePool"))
    assert pool.outputs[0].dtype == TensorProto.FLOAT


def signed(m: Sketch, output: str) -> Any:
    """Optimized for a device that takes signed bytes and rounds within Regions."""
    context = PassContext(fuses_quantized=True, signed_bytes=True, rounds_within="anywhere")
    return m.optimize(SHAPE, [output], context=context)


@pytest.mark.parametrize("zero", [0, 30, 255])
def test_bytes_become_signed(zero: int) -> None:
    m = Sketch("u8")
    y = m.quantized(m.add("Relu", [m.conv(m.quantized("x", 0.02, zero), 16, 8)]), 0.05, zero)
    made = signed(m, y)
    assert not any(v.dtype == TensorProto.UINT8 for n in made.graph for v in n.outputs)


def test_bytes_that_leave_the_model_stay_unsigned() -> None:
    m = Sketch("u8")
    at = m.numbers(0.05, 9)
    y = m.add("QuantizeLinear", [m.conv(m.quantized("x", 0.02, 7), 16, 8), *at])
    made = signed(m, y)
    assert any(v is not None and v.dtype == TensorProto.UINT8 for n in made.graph for v in n.inputs)


def test_a_chain_of_roundings_is_one_region() -> None:
    m = Sketch("s8")
    x = m.quantized("x", 0.02, 3)
    y = m.quantized(m.conv(x, 8, 8), 0.05, 9)
    y = m.quantized(m.add("Add", [y, x]), 0.07, 1)
    made = signed(m, m.quantized(m.add("Relu", [y]), 0.05, 2))
    pair = "QuantizeLinear+DequantizeLinear"
    inside = f"{'DequantizeLinear+' * 3}Conv+{pair}+Add+{pair}+Relu+QuantizeLinear"
    assert regions(made) == [f"quantized:{inside}"]


def test_the_branch_that_rounds_less_takes_the_addition() -> None:
    m = Sketch("s8")
    x = m.quantized("x", 0.02, 3)
    side = m.quantized(m.conv(x, 8, 8), 0.05, 9)
    y = m.quantized(m.add("Relu", [m.add("Add", [m.conv(x, 8, 8), side])]), 0.05, 2)
    plain, whole_chain = sorted(regions(signed(m, y)), key=len)
    assert plain == PLAIN
    assert whole_chain == "quantized:DequantizeLinear+DequantizeLinear+DequantizeLinear+Conv+Add+Relu+QuantizeLinear"


def test_a_rounding_that_others_read_ends_the_region() -> None:
    m = Sketch("s8")
    x = m.quantized("x", 0.02, 3)
    y = m.quantized(m.conv(x, 8, 8), 0.05, 9)
    total = m.quantized(m.add("Add", [m.add("Relu", [m.add("Add", [y, x])]), y]), 0.07, 1)
    assert regions(signed(m, total))[0] == PLAIN


def test_a_bias_behind_a_rounding() -> None:
    """As MatMul and Add of a constant are exported: what is added has no node that makes it."""
    m = Sketch("s8")
    y = m.quantized(m.add("MatMul", [m.quantized("x", 0.02, 3), m.weight((6, 6), 1)]), 0.05, 9)
    y = m.add("Add", [y, m.constant(np.arange(6, dtype=np.float32))])
    made = signed(m, m.quantized(y, 0.07, 1))
    pair = "QuantizeLinear+DequantizeLinear"
    assert regions(made) == [f"quantized:DequantizeLinear+DequantizeLinear+MatMul+{pair}+Add+QuantizeLinear"]
