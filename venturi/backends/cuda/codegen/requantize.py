"""Epilogues of quantized contractions with as few instructions as their roundings leave.

What follows the sums is kept as a sum of terms, each a variable times a factor, plus a constant. QuantizeLinear divides
factors and constant by its scale on the host, DequantizeLinear multiplies them, a residual is one more term, and a Relu
between two roundings bounds the second one from below. A stored number's range is stretched to that from 0 to 1, to
which an instruction saturates. So a rounding costs one fused multiplication and addition a term, and one that rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from venturi.backends.cuda.codegen.expressions import BYTE_LIMITS, STORE_TYPES, Body
from venturi.backends.cuda.codegen.tile import RAISED_SUMS, Operands, TileBody, is_column, static_shape_of
from venturi.backends.real_view import Numbers, RealView
from venturi.ir.build import static_shape

T = torch.Tensor
Factor = Callable[[], T]
# Adding 1.5 * 2^23, whose bits are 0x4B400000, rounds to an integer, half to even, and leaves it in the low bits.
_MAGIC = 12582912.0
_MAGIC_RANGE = 1 << 22


@dataclass(frozen=True)
class _Sum:
    """A real value: multiples of variables (no factor is one) and a constant; below zero it is zero if `cut`.

    With `columns` the first factor and the constant have one element a column, else all have one element. fp64.
    """

    terms: tuple[tuple[str, Factor | None], ...]
    constant: Factor | None = None
    columns: bool = False
    cut: bool = False

    def times(self, by: float) -> _Sum:
        terms = tuple((name, _times(factor, by)) for name, factor in self.terms)
        return replace(self, terms=terms, constant=None if self.constant is None else _times(self.constant, by))

    def plus(self, constant: Factor) -> _Sum:
        before, like = self.constant or _number(0.0), self.terms[0][1] or _number(0.0)
        return replace(self, constant=lambda: before() + constant() + 0.0 * like())


def _times(factor: Factor | None, by: float) -> Factor:
    return _number(by) if factor is None else lambda: factor() * by


def _number(x: float) -> Factor:
    """Of no dimension: it goes together with columns on any device."""
    return lambda: torch.tensor(x, dtype=torch.float64)


@dataclass
class _Writer:
    """Appends statements; columns and single numbers become arguments of the kernel."""

    real: RealView
    operands: Operands
    body: Body
    count: int = 0

    def name(self, text: str) -> str:
        self.count += 1
        self.body.lines.append(f"r{self.count} = {text}")
        return f"r{self.count}"

    def written(self, value: _Sum) -> str:
        """A variable that holds the value, without its cut."""
        return self.name(self.text(value))

    def text(self, value: _Sum) -> str:
        """Of the value, without its cut; none of no terms and no constant."""
        whole = 0 if value.columns else 1
        text = "" if value.constant is None else self.operands.column(value.constant, whole)
        for i, (name, factor) in enumerate(value.terms):
            product = name
            if factor is not None:
                product += f" * {self.operands.column(factor, whole if i == 0 else 1)}"
            text = product if not text else f"{product} + ({text})"
        return text

    def bounded(self, value: _Sum, numbers: Numbers, plus: float) -> str:
        """The text of the stored number less its zero, not yet an integer, `plus` a number."""
        low, high = (float(bound - numbers.zero) for bound in BYTE_LIMITS[numbers.dtype])
        floor = max(low, 0.0) if value.cut else low
        part = value.times(1.0 / (numbers.scale * (high - floor)))
        x = self.saturated(part.plus(_number(-floor / (high - floor))) if floor else part)
        return f"({x} * {self.operands.number(high - floor)} + {self.operands.number(plus + floor)})"

    def saturated(self, value: _Sum) -> str:
        """A variable that holds the value between 0 and 1."""
        *before, (name, factor) = value.terms
        rest = replace(value, terms=tuple(before))
        assert factor is not None
        return self.name(
            f"_saturated({name}, {self.operands.column(factor, 0 if value.columns and not before else 1)}, "
            f"{self.text(rest) or '0.0'})"
        )

    def rounded(self, value: _Sum, numbers: Numbers) -> str:
        """A variable with the stored integer less its zero."""
        return self.name(f"{self.bounded(value, numbers, _MAGIC)} - {_MAGIC:.1f}")

    def stored(self, value: _Sum, numbers: Numbers) -> str:
        """The text of the stored integer. An even zero leaves halves where they are and is added before rounding."""
        odd = numbers.zero % 2
        bits = f"{self.bounded(value, numbers, _MAGIC + (0 if odd else numbers.zero))}.to(tl.int32, bitcast=True)"
        after = f" + {self.operands.number(float(numbers.zero))}.to(tl.int32)" if odd else ""
        return f"({bits}{after}).to({STORE_TYPES[numbers.dtype]})"

    def cut(self, value: _Sum) -> str:
        made = self.written(value)
        return self.name(f"tl.maximum({made}, 0.0, propagate_nan=tl.PropagateNan.ALL)") if value.cut else made


def read_quantized_tile(
    real: RealView, channel_axis: int, depth: int, factor: Factor, summand: Factor | None, out: Numbers
) -> TileBody | str:
    """The epilogue of a quantized Region.

    A sum of `depth` products, times `factor`, plus `summand` is real; both have one element a column, fp64.
    """
    output, made = real.outputs[0], real.anchor.outputs[0]
    if len(real.outputs) != 1 or made.shape is None or list(output.shape or ()) != list(made.shape):
        return "more than one output, or the epilogue changes the shape"
    operands, body = Operands(real, channel_axis), Body(real, {})
    writer = _Writer(real, operands, body)
    value = _Sum(((writer.name(_real(depth)), factor),), summand, columns=True)
    for node in real.nodes[1:]:
        found = _after(node, value, writer)
        if isinstance(found, str):
            return found
        value = found
    if real.end is None:
        result = writer.cut(value)
    else:
        result = writer.stored(value, out)
    return TileBody(tuple(operands.columns), tuple(operands.tiles), (*body.lines, f"result = {result}"), output)


def _real(depth: int) -> str:
    """The sums as fp32. The conversion is an instruction of few units; sums of few products do without it."""
    if depth * 128 * 128 > _MAGIC_RANGE:
        return "acc.to(tl.float32)"
    return f"{RAISED_SUMS}.to(tl.float32, bitcast=True) - {_MAGIC:.1f}"


def _after(node: ir.Node, value: _Sum, writer: _Writer) -> _Sum | str:
    """`value` behind one more node."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        small = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        numbers = writer.real.numbers(node, small)
        if numbers is None:
            return f"{node.op_type} with more than one scale"
        if node.op_type == "DequantizeLinear":
            return value.times(numbers.scale)
        return _Sum(((writer.rounded(value, numbers), None),))
    if node.op_type == "Relu":
        return replace(value, cut=True)
    if node.op_type == "Add" and not value.cut:
        found = _with_residual(node, value, writer) or _with_bias(node, value, writer)
        if found is not None:
            return found
    return _general(node, value, writer)


def _with_residual(node: ir.Node, value: _Sum, writer: _Writer) -> _Sum | None:
    for given in node.inputs:
        back = writer.real.dequantizer(given)
        if back is None or given is None or given.shape is None or writer.real.is_constant(given):
            continue
        numbers, stored = writer.real.numbers(back, back.inputs[0]), back.inputs[0]
        same = list(given.shape) == list(node.outputs[0].shape or ())
        if numbers is None or stored is None or not same or not all(_named(d) for d in given.shape):
            continue
        term = (writer.operands.tile(stored), _number(numbers.scale))
        total = replace(value, terms=(*value.terms, term))
        return total.plus(_number(-numbers.scale * numbers.zero)) if numbers.zero else total
    return None


def _named(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _with_bias(node: ir.Node, value: _Sum, writer: _Writer) -> _Sum | None:
    made = writer.real.anchor.outputs[0]
    axis = writer.operands.axis
    for given in node.inputs:
        if given is None or not value.columns or not writer.real.is_constant(given):
            continue
        size = static_shape_of(made, axis)
        if is_column(static_shape(given), size, len(made.shape or ()), axis):
            return value.plus(lambda given=given: writer.real.constant(given).double().reshape(-1))  # type: ignore[misc]
    return None


def _general(node: ir.Node, value: _Sum, writer: _Writer) -> _Sum | str:
    """Any other pointwise operator: it needs the value itself."""
    before = next((v for v in node.inputs if v is not None and not writer.real.is_input(v)), None)
    if before is None:
        return f"{node.op_type} does not read what is in front of it"
    writer.body.names[before] = writer.cut(value)
    reason = writer.operands.bind(node, writer.body)
    if reason:
        return reason
    if not writer.body.add(node):
        return f"no expression for {node.op_type}"
    return _Sum(((writer.body.names[node.outputs[0]], None),))
