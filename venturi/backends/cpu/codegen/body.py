"""Pointwise nodes as statements over numbered fp32 values, and their code on vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.activation import ACTIVATIONS, Post
from venturi.backends.cpu.codegen.element import BF16, BYTES, FLOAT, OF_GRAPH, Element, Place, narrow, widen
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.ir.dtypes import DT

Emit = Callable[[Emitter, list[Val], Mapping[str, Any]], Val]


@dataclass(frozen=True)
class Statement:
    """One operator on values given by number; -1 is an input left out. Its result takes the next number."""

    op: str
    inputs: tuple[int, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Body:
    """A value is loaded for each of `elements`, then one computed a statement; `result` is stored as `out`."""

    elements: tuple[Element, ...]
    statements: tuple[Statement, ...]
    result: int
    out: Element = FLOAT

    @property
    def pointers(self) -> int:
        return len(self.elements)

    def places(self, e: Emitter) -> list[Place]:
        """The operands' and the output's, in the first words of the arguments."""
        return [e.pointer(i, element) for i, element in enumerate((*self.elements, self.out))]


def _fold(op: Callable[[Emitter, Val, Val], Val]) -> Emit:
    def emit(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
        out = a[0]
        for x in a[1:]:
            out = op(e, out, x)
        return out

    return emit


def _activation(name: str) -> Emit:
    defaults = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2, "Swish": 1.0}

    def emit(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
        post = Post(
            name, float(attrs.get("alpha", defaults.get(name, 0.0))), float(attrs.get("beta", 0.5)),
            mode=str(attrs.get("approximate", "none")),
        )  # fmt: skip
        return ACTIVATIONS[name](e, a[0], post)

    return emit


def _clip(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
    x = a[0]
    if len(a) > 1 and a[1] is not None:
        x = m.maximum(e, x, a[1])
    return m.minimum(e, x, a[2]) if len(a) > 2 and a[2] is not None else x


def _compare(sign: str) -> Emit:
    return lambda e, a, attrs: e.b.fcmp_ordered(sign, a[0], a[1])


def _unary(name: str) -> Emit:
    return lambda e, a, attrs: e.b.call(e.math(name, 1), [a[0]])


def _softplus(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
    """log(1 + exp x) as max(x, 0) + log(1 + exp -|x|)."""
    size = m.absolute(e, a[0])
    rest = m.log1p(e, m.exp(e, e.b.fneg(size)))
    return e.b.fadd(m.at_least(e, a[0], 0.0), rest)


def _cast(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
    if attrs["to"] == DT.FLOAT:
        return a[0]
    return widen(e.b, narrow(e.b, a[0], BF16, e.isa.lanes, e.isa.rounds_bf16), BF16, e.isa.lanes)


def _dequantize(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
    return e.b.fmul(e.b.fsub(a[0], e.constant(attrs["zero"])), e.constant(attrs["scale"]))


def _quantize(e: Emitter, a: list[Val], attrs: Mapping[str, Any]) -> Val:
    scaled = e.b.fmul(a[0], e.constant(1.0 / attrs["scale"]))
    return m.quantize(e, scaled, e.constant(attrs["zero"]), attrs["limits"])


_ELEMENTS = OF_GRAPH | BYTES
EXPRESSIONS: dict[str, Emit] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Add": _fold(lambda e, x, y: e.b.fadd(x, y)),
    "Sum": _fold(lambda e, x, y: e.b.fadd(x, y)),
    "Sub": lambda e, a, attrs: e.b.fsub(a[0], a[1]),
    "Mul": lambda e, a, attrs: e.b.fmul(a[0], a[1]),
    "Div": lambda e, a, attrs: e.b.fdiv(a[0], a[1]),
    "Neg": lambda e, a, attrs: e.b.fneg(a[0]),
    "Abs": lambda e, a, attrs: m.absolute(e, a[0]),
    "Sqrt": _unary("sqrt"),
    "Floor": _unary("floor"),
    "Ceil": _unary("ceil"),
    "Round": _unary("rint"),
    "Reciprocal": lambda e, a, attrs: e.b.fdiv(e.constant(1.0), a[0]),
    "Exp": lambda e, a, attrs: m.exp(e, a[0]),
    "Log": lambda e, a, attrs: m.log(e, a[0]),
    "Erf": lambda e, a, attrs: m.erf(e, a[0]),
    "Softplus": _softplus,
    "Identity": lambda e, a, attrs: a[0],
    "Cast": _cast,
    "Max": _fold(m.maximum),
    "Min": _fold(m.minimum),
    "Clip": _clip,
    "Equal": _compare("=="),
    "Greater": _compare(">"),
    "Less": _compare("<"),
    "GreaterOrEqual": _compare(">="),
    "LessOrEqual": _compare("<="),
    "And": lambda e, a, attrs: e.b.and_(a[0], a[1]),
    "Or": lambda e, a, attrs: e.b.or_(a[0], a[1]),
    "Not": lambda e, a, attrs: e.b.not_(a[0]),
    "Where": lambda e, a, attrs: e.b.select(a[0], a[1], a[2]),
    "PRelu": lambda e, a, attrs: e.b.select(
        e.b.fcmp_ordered("<", a[0], e.constant(0.0)), e.b.fmul(a[0], a[1]), a[0]
    ),
    **{name: _activation(name) for name in ACTIVATIONS if name != "Clip"},
}  # fmt: skip
_ATTRS = ("alpha", "beta", "approximate", "to")
_POWERS: dict[float, Emit] = {
    2.0: lambda e, a, attrs: e.b.fmul(a[0], a[0]),
    3.0: lambda e, a, attrs: e.b.fmul(e.b.fmul(a[0], a[0]), a[0]),
    0.5: lambda e, a, attrs: e.b.call(e.math("sqrt", 1), [a[0]]),
    1.0: lambda e, a, attrs: a[0],
}


@dataclass(frozen=True)
class Reading:
    """A Body with the values behind its pointers. `before` statements precede the anchor where there is one."""

    body: Body
    pointers: tuple[ir.Value, ...]


def read_body(region: RegionView, anchor: ir.Node | None = None) -> Reading | str:
    """The Region's nodes as statements, or why there is no code for one. The `anchor`'s statement keeps its operator's
    name and its inputs; whoever emits the body knows what to do at it."""
    out = _ELEMENTS.get(region.outputs[0].dtype) if len(region.outputs) == 1 else None  # type: ignore[arg-type]
    if out is None:
        return "not one output in fp32, bf16 or bytes"
    used = [v for v in dict.fromkeys(v for n in region.nodes for v in n.inputs) if v is not None]
    outer = [v for v in used if any(v is f for f in region.formal)]
    scalars = {v: float(w.reshape(())) for v in outer if (w := region.constant(v)) is not None and _is_scalar(v, w)}
    pointers = [v for v in outer if v not in scalars]
    elements = [_ELEMENTS.get(v.dtype) if isinstance(v.type, ir.TensorType) else None for v in pointers]  # type: ignore[arg-type]
    read = tuple(e for e in elements if e is not None)
    if len(read) != len(elements):
        return "an input is not a tensor in fp32, bf16 or bytes"
    if [n.op_type for n in region.nodes] == ["Identity"]:
        return "nothing to compute"
    number = {v: i for i, v in enumerate(pointers)}
    statements: list[Statement] = []

    def append(statement: Statement) -> int:
        statements.append(statement)
        return len(pointers) + len(statements) - 1

    for value, x in scalars.items():
        number[value] = append(Statement("Constant", (), (("value", x),)))
    for node in region.nodes:
        inputs = tuple(-1 if v is None else number[v] for v in node.inputs)
        attrs = region.attrs(node)
        if node is anchor:
            kept = tuple((k, attrs[k]) for k in ("epsilon",) if k in attrs)
        elif node.op_type == "Pow" and not node.domain:
            exponent = scalars.get(node.inputs[1])  # type: ignore[arg-type]
            if exponent not in _POWERS:
                return f"Pow by {exponent}"
            kept, inputs = (("exponent", exponent),), inputs[:1]
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and _one_scale(node, scalars):
            zero = scalars.get(node.inputs[2], 0.0) if len(node.inputs) > 2 else 0.0  # type: ignore[arg-type]
            kept, inputs = (("scale", scalars[node.inputs[1]]), ("zero", zero)), inputs[:1]  # type: ignore[index]
            if node.op_type == "QuantizeLinear":
                kept = (*kept, ("limits", _ELEMENTS[node.outputs[0].dtype].limits))  # type: ignore[index]
        elif node.op_type not in EXPRESSIONS or node.domain or not _types_fit(node):
            return f"no code for {node.op_type} on these types"
        else:
            kept = tuple((k, attrs[k]) for k in _ATTRS if k in attrs)
        number[node.outputs[0]] = append(Statement(node.op_type, inputs, kept))
    return Reading(Body(read, tuple(statements), number[region.outputs[0]], out), tuple(pointers))


def _one_scale(node: ir.Node, scalars: Mapping[ir.Value, float]) -> bool:
    """Between fp32 and bytes, by a scale and a zero that are constants."""
    small, wide = node.outputs[0], node.inputs[0]
    if node.op_type == "DequantizeLinear":
        small, wide = wide, small  # type: ignore[assignment]
    known = all(v in scalars for v in node.inputs[1:] if v is not None)
    return known and small.dtype in BYTES and wide is not None and wide.dtype == DT.FLOAT


def _is_scalar(value: ir.Value, weight: Any) -> bool:
    return value.dtype in _ELEMENTS and weight.numel() == 1


def _types_fit(node: ir.Node) -> bool:
    """One of the types that kernels read throughout; booleans only where the operator makes or takes them."""
    logic = {"And", "Or", "Not"}
    made = {"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"} | logic
    types = [None if v is None else v.dtype for v in node.inputs]
    out = node.outputs[0].dtype
    if node.op_type == "Cast":
        return types[0] in OF_GRAPH and out in OF_GRAPH
    if node.op_type == "Where":
        return types[0] == DT.BOOL and out in OF_GRAPH and types[1:] == [out, out]
    number = next((t for t in types if t in OF_GRAPH), DT.FLOAT)
    wanted = DT.BOOL if node.op_type in logic else number
    return all(t in (wanted, None) for t in types) and out == (DT.BOOL if node.op_type in made else number)


def emit_statement(e: Emitter, s: Statement, values: Sequence[Val]) -> Val:
    attrs = dict(s.attrs)
    if s.op == "Constant":
        return e.constant(attrs["value"])
    inputs = [None if i < 0 else values[i] for i in s.inputs]
    emit = _POWERS[attrs["exponent"]] if s.op == "Pow" else EXPRESSIONS[s.op]
    return emit(e, inputs, attrs)
