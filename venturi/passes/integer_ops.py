"""Operators on integers become the operator on numbers between DequantizeLinear and QuantizeLinear.

onnxruntime exports quantized models in three forms: Q/DQ pairs, operators on integers with the numbers of all their
tensors (QLinearConv, QLinearAdd, QGemm, ...), and products of integers whose scales are computed at run time
(DynamicQuantizeLinear, MatMulInteger, Cast, Mul). All three say the same; the first is what the other passes know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from venturi.ir.build import attr, const_array, constant, get_attr, make_node, rank
from venturi.ir.dtypes import DT
from venturi.ops.table import CONTRIB
from venturi.passes.rewriting import PassContext, commuted, producer, single_use, substitute

_BYTES = (DT.UINT8, DT.INT8)
Real = Callable[["_Rewriting"], ir.Value | None]


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        rewrite = _REWRITES.get((node.domain, node.op_type))
        if rewrite is None or node.graph is not graph:
            continue
        made = _Rewriting(graph, node)
        result = rewrite(made)
        if result is None:
            continue
        if not ctx.take():
            return
        substitute(made.matched, made.new, [(made.matched[-1].outputs[0], result)])


class _Rewriting:
    """`matched` nodes, in order, that `new` ones replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.matched: list[ir.Node] = [node]
        self.new: list[ir.Node] = []

    def given(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        self.new.append(ir.Node("", op_type, list(inputs), list(attributes)))
        return self.new[-1].outputs[0]

    def real(self, x: int, scale: int, zero: int, axis: int | None = None) -> ir.Value | None:
        """The numbers behind the integers of input `x`; None where one of the three is no such thing."""
        return self.numbers(self.given(x), self.given(scale), self.given(zero), axis)

    def numbers(
        self, x: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int | None = None
    ) -> ir.Value | None:
        if x is None or scale is None or x.dtype not in _BYTES or scale.dtype != DT.FLOAT:
            return None
        scales, zeros = const_array(scale), const_array(zero)
        fixed = scales is not None and (zero is None or zeros is not None)
        if axis is not None and fixed and max(scales.size, 0 if zeros is None else zeros.size) > 1:  # type: ignore[union-attr]
            return self.add("DequantizeLinear", [x, *self._along(scales, zeros)], [attr("axis", axis)])
        if not _one(scale) or (zero is not None and not _one(zero)):
            return None
        rest = [] if zero is None else [self._scalar(zero)]
        return self.add("DequantizeLinear", [x, self._scalar(scale), *rest])

    def _along(self, *arrays: np.ndarray[Any, Any] | None) -> list[ir.Value]:
        """Rows of one length."""
        found = [a.reshape(-1) for a in arrays if a is not None]
        wide = max(a.size for a in found)
        return [constant(self.graph, np.broadcast_to(a, (wide,)).copy(), "number") for a in found]

    def quantized(self, y: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value | None:
        out = self.node.outputs[0]
        if scale is None or scale.dtype != DT.FLOAT or not _one(scale) or out.dtype not in _BYTES:
            return None
        if zero is None:
            zero = constant(self.graph, np.array(0, out.dtype.numpy()), "zero")
        return self.add("QuantizeLinear", [y, self._scalar(scale), self._scalar(zero)]) if _one(zero) else None

    def bias(self, value: ir.Value | None, *scales: int) -> ir.Value | None:
        """int32 [N] whose scale is the product of other tensors' constant scales."""
        parts = [const_array(self.given(s)) for s in scales]
        stored = const_array(value)
        if stored is None or any(p is None for p in parts):
            return None
        scale = np.ones(1, np.float64)
        for p in parts:
            scale = scale * p.reshape(-1).astype(np.float64)  # type: ignore[union-attr]
        wide = np.broadcast_to(scale, (stored.size,)).astype(np.float32)
        return constant(self.graph, stored.reshape(-1).astype(np.float32) * wide, "bias")

    def _scalar(self, value: ir.Value) -> ir.Value:
        found = const_array(value)
        return value if found is None or found.ndim == 0 else constant(self.graph, found.reshape(()), "number")


def _one(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and all(isinstance(d, int) and d == 1 for d in shape)


def _conv(r: _Rewriting) -> ir.Value | None:
    x, w = r.real(0, 1, 2), r.real(3, 4, 5, axis=0)
    bias = r.bias(r.given(8), 1, 4) if r.given(8) is not None else None
    if x is None or w is None or (bias is None and r.given(8) is not None):
        return None
    y = r.add("Conv", [x, w, *([bias] if bias else [])], list(r.node.attributes.values()))
    return r.quantized(y, r.given(6), r.given(7))


def _matmul(r: _Rewriting) -> ir.Value | None:
    last = rank(r.given(3))
    a, b = r.real(0, 1, 2), r.real(3, 4, 5, axis=None if last is None or last < 2 else last - 1)
    return None if a is None or b is None else r.quantized(r.add("MatMul", [a, b]), r.given(6), r.given(7))


def _gemm(r: _Rewriting) -> ir.Value | None:
    trans, alpha = get_attr(r.node, "transB", 0), get_attr(r.node, "alpha", 1.0)
    a, b = r.real(0, 1, 2), r.real(3, 4, 5, axis=0 if trans else 1)
    bias = r.bias(r.given(6), 1, 4) if r.given(6) is not None else None
    if a is None or b is None or (bias is None and r.given(6) is not None):
        return None
    numbers = [attr("alpha", alpha), attr("beta", alpha), attr("transA", get_attr(r.node, "transA", 0))]
    y = r.add("Gemm", [a, b, *([bias] if bias else [])], [*numbers, attr("transB", trans)])
    return y if r.given(7) is None else r.quantized(y, r.given(7), r.given(8))


def _binary(op_type: str) -> Real:
    def rewrite(r: _Rewriting) -> ir.Value | None:
        a, b = r.real(0, 1, 2), r.real(3, 4, 5)
        return None if a is None or b is None else r.quantized(r.add(op_type, [a, b]), r.given(6), r.given(7))

    return rewrite


def _unary(op_type: str) -> Real:
    def rewrite(r: _Rewriting) -> ir.Value | None:
        x = r.real(0, 1, 2)
        if x is None or get_attr(r.node, "channels_last", 0):
            return None
        kept = [a for n, a in r.node.attributes.items() if n != "channels_last"]
        return r.quantized(r.add(op_type, [x], kept), r.given(3), r.given(4))

    return rewrite


def _concat(r: _Rewriting) -> ir.Value | None:
    parts = [r.real(i, i + 1, i + 2) for i in range(2, len(r.node.inputs), 3)]
    if any(p is None for p in parts):
        return None
    return r.quantized(r.add("Concat", parts, list(r.node.attributes.values())), r.given(0), r.given(1))


def _integer_product(op_type: str) -> Real:
    """MatMulInteger or ConvInteger, Cast, and the Mul by the product of both scales."""

    def rewrite(r: _Rewriting) -> ir.Value | None:
        cast = single_use(r.node.outputs[0])
        if cast is None or cast.domain or cast.op_type != "Cast" or cast.outputs[0].dtype != DT.FLOAT:
            return None
        scaled = single_use(cast.outputs[0])
        if scaled is None or scaled.domain or scaled.op_type != "Mul":
            return None
        scales = next((_scales(r, other) for value, other in commuted(scaled) if value is cast.outputs[0]), None)
        if scales is None:
            return None
        r.matched += [cast, scaled]
        last = rank(r.given(1))
        axis = 0 if op_type == "Conv" else None if last is None or last < 2 else last - 1
        a = r.numbers(r.given(0), scales[0], r.given(2))
        b = r.numbers(r.given(1), scales[1], r.given(3), axis)
        attributes = list(r.node.attributes.values())
        return None if a is None or b is None else r.add(op_type, [a, b], attributes)

    return rewrite


def _scales(r: _Rewriting, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(of the computed operand, of the weights): `value` is their product."""
    product = producer(value, "Mul")
    dynamic = producer(r.given(0), "DynamicQuantizeLinear")
    if product is None or dynamic is None:
        return None
    return next(((a, b) for a, b in commuted(product) if a is dynamic.outputs[1] and const_array(b) is not None), None)


def _to_float(r: _Rewriting) -> ir.Value | None:
    """MatMulIntegerToFloat: both operands, both scales, both zeros, bias."""
    last = rank(r.given(1))
    a = r.numbers(r.given(0), r.given(2), r.given(4))
    b = r.numbers(r.given(1), r.given(3), r.given(5), None if last is None or last < 2 else last - 1)
    return None if a is None or b is None else _with_bias(r, r.add("MatMul", [a, b]), r.given(6))


def _dynamic(r: _Rewriting) -> ir.Value | None:
    """DynamicQuantizeMatMul: the number's matrix, weights with scale and zero, bias."""
    x, last = r.given(0), rank(r.given(1))
    if x is None or x.dtype != DT.FLOAT:
        return None
    quantize = make_node("DynamicQuantizeLinear", [x], num_outputs=3)
    r.new.append(quantize)
    small, scale, zero = quantize.outputs
    a = r.add("DequantizeLinear", [small, scale, zero])
    b = r.numbers(r.given(1), r.given(2), r.given(3), None if last is None or last < 2 else last - 1)
    return None if b is None else _with_bias(r, r.add("MatMul", [a, b]), r.given(4))


def _with_bias(r: _Rewriting, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    return y if bias is None else r.add("Add", [y, bias])


_REWRITES: dict[tuple[str, str], Real] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    ("", "MatMulInteger"): _integer_product("MatMul"),
    ("", "ConvInteger"): _integer_product("Conv"),
    (CONTRIB, "QGemm"): _gemm,
    (CONTRIB, "QLinearAdd"): _binary("Add"),
    (CONTRIB, "QLinearMul"): _binary("Mul"),
    (CONTRIB, "QLinearSigmoid"): _unary("Sigmoid"),
    (CONTRIB, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (CONTRIB, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (CONTRIB, "QLinearConcat"): _concat,
    (CONTRIB, "MatMulIntegerToFloat"): _to_float,
    (CONTRIB, "DynamicQuantizeMatMul"): _dynamic,
}
