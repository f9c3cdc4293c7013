"""Pointwise operators as Triton expressions, and the writer that strings the nodes of a Region together.

Floating values are computed in fp32 and rounded when stored; integers and booleans keep their types. NaN
propagates as the references propagate it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8

TRITON_TYPES = {
    DT.FLOAT: "fp32", DT.FLOAT16: "fp16", DT.BFLOAT16: "bf16", DT.INT64: "i64", DT.INT32: "i32",
    DT.INT16: "i16", DT.INT8: "i8", DT.UINT8: "u8", DT.BOOL: "i1",
}  # fmt: skip
STORE_TYPES = {
    DT.FLOAT: "tl.float32", DT.FLOAT16: "tl.float16", DT.BFLOAT16: "tl.bfloat16", DT.INT64: "tl.int64",
    DT.INT32: "tl.int32", DT.INT16: "tl.int16", DT.INT8: "tl.int8", DT.UINT8: "tl.uint8", DT.BOOL: "tl.int1",
}  # fmt: skip
HALF = (DT.FLOAT16, DT.BFLOAT16)
BYTE_LIMITS = {DT.INT8: (-128, 127), DT.UINT8: (0, 255)}
WIDE = (DT.FLOAT, DT.FLOAT16, DT.BFLOAT16)

Attrs = Mapping[str, Any]
Emit = Callable[[list[str], Attrs], str]


def literal(x: float) -> str:
    """A Python literal Triton accepts, infinities included."""
    if x != x:
        return 'float("nan")'
    if x in (float("inf"), -float("inf")):
        return f'float("{x}")'
    return repr(float(x))


def _maximum(a: str, b: str) -> str:
    return f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def _minimum(a: str, b: str) -> str:
    return f"tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def _clamped(x: str, low: float, high: float) -> str:
    return _minimum(_maximum(x, literal(low)), literal(high))


def _fold(op: Callable[[str, str], str]) -> Emit:
    def emit(a: list[str], attrs: Attrs) -> str:
        out = a[0]
        for x in a[1:]:
            out = op(out, x)
        return out

    return emit


def _gelu(a: list[str], attrs: Attrs) -> str:
    x = a[0]
    if attrs.get("approximate", "none") == "tanh":
        return f"({x} * _sigmoid(1.5957691216057308 * ({x} + 0.044715 * {x} * {x} * {x})))"
    return f"(0.5 * {x} * (1.0 + _erf({x} * 0.7071067811865476)))"


def _hard_sigmoid(a: list[str], attrs: Attrs) -> str:
    inner = f"({a[0]} * {literal(attrs.get('alpha', 0.2))} + {literal(attrs.get('beta', 0.5))})"
    return _clamped(inner, 0.0, 1.0)


def _leaky(a: list[str], attrs: Attrs) -> str:
    return f"tl.where({a[0]} < 0.0, {a[0]} * {literal(attrs.get('alpha', 0.01))}, {a[0]})"


def _elu(a: list[str], attrs: Attrs) -> str:
    return f"tl.where({a[0]} < 0.0, {literal(attrs.get('alpha', 1.0))} * (tl.exp({a[0]}) - 1.0), {a[0]})"


def _swish(a: list[str], attrs: Attrs) -> str:
    return f"({a[0]} * _sigmoid({literal(attrs.get('alpha', 1.0))} * {a[0]}))"


def _binary(sign: str) -> Emit:
    return lambda a, attrs: f"({a[0]} {sign} {a[1]})"


# Operators of floats only; Add, Sub, Mul, Max, Min, Neg, Abs and the comparisons are right for integers too.
FLOAT_ONLY: dict[str, Emit] = {
    "Div": _binary("/"),
    "Relu": lambda a, attrs: _maximum(a[0], "0.0"),
    "LeakyRelu": _leaky,
    "Elu": _elu,
    "Sigmoid": lambda a, attrs: f"_sigmoid({a[0]})",
    "Tanh": lambda a, attrs: f"_tanh({a[0]})",
    "Exp": lambda a, attrs: f"tl.exp({a[0]})",
    "Log": lambda a, attrs: f"tl.log({a[0]})",
    "Sqrt": lambda a, attrs: f"tl.sqrt_rn({a[0]})",
    "Reciprocal": lambda a, attrs: f"(1.0 / {a[0]})",
    "Erf": lambda a, attrs: f"_erf({a[0]})",
    "Gelu": _gelu,
    "Swish": _swish,
    "HardSwish": lambda a, attrs: f"({a[0]} * {_clamped(f'({a[0]} * {literal(1 / 6)} + 0.5)', 0.0, 1.0)})",
    "HardSigmoid": _hard_sigmoid,
    "Mish": lambda a, attrs: f"({a[0]} * _tanh(_softplus({a[0]})))",
    "Softplus": lambda a, attrs: f"_softplus({a[0]})",
    "Floor": lambda a, attrs: f"tl.floor({a[0]})",
    "Ceil": lambda a, attrs: f"tl.ceil({a[0]})",
    "Sin": lambda a, attrs: f"tl.sin({a[0]})",
    "Cos": lambda a, attrs: f"tl.cos({a[0]})",
    "PRelu": lambda a, attrs: f"tl.where({a[0]} < 0.0, {a[0]} * {a[1]}, {a[0]})",
    "Softsign": lambda a, attrs: f"({a[0]} / (1.0 + tl.abs({a[0]})))",
    "Max": _fold(_maximum),
    "Min": _fold(_minimum),
}
ANY: dict[str, Emit] = {
    "Add": _binary("+"),
    "Sub": _binary("-"),
    "Mul": _binary("*"),
    "Neg": lambda a, attrs: f"(-{a[0]})",
    "Abs": lambda a, attrs: f"tl.abs({a[0]})",
    "Sum": _fold(lambda x, y: f"({x} + {y})"),
    "Identity": lambda a, attrs: a[0],
    "Equal": _binary("=="),
    "Greater": _binary(">"),
    "Less": _binary("<"),
    "GreaterOrEqual": _binary(">="),
    "LessOrEqual": _binary("<="),
    "And": _binary("&"),
    "Or": _binary("|"),
    "Not": lambda a, attrs: f"({a[0]} == 0)",
    "Where": lambda a, attrs: f"tl.where({a[0]}, {a[1]}, {a[2]})",
}


def expression(region: RegionView, node: ir.Node, args: list[str]) -> str | None:
    """The node's value from the names of its inputs, or None when there is no expression for it."""
    if node.domain or len(node.outputs) != 1 or any(v is not None and v.dtype not in TRITON_TYPES for v in node.inputs):
        return None
    out, attrs = node.outputs[0].dtype, region.attrs(node)
    if out not in TRITON_TYPES:
        return None
    present = [v.dtype for v in node.inputs if v is not None]
    floats = all(d in WIDE for d in present)
    if node.op_type == "Cast":
        return _cast(args[0], present[0], out)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _between(region, node, args)
    if node.op_type == "Clip":
        return _clip(args) if floats else None
    if node.op_type == "Pow":
        return _pow(region, node, args) if floats else None
    if node.op_type == "Gelu" and out in HALF and attrs.get("approximate", "none") == "none":
        return f"_gelu_half({args[0]})"
    if node.op_type in FLOAT_ONLY:
        return FLOAT_ONLY[node.op_type](args, attrs) if floats and out in WIDE else None
    emit = ANY.get(node.op_type)
    if emit is None:
        return None
    if node.op_type in ("Add", "Sub", "Mul", "Neg", "Abs", "Sum") and not floats and out not in (DT.INT32, DT.INT64):
        return None
    return emit(args, attrs)


def _cast(x: str, given: DT | None, out: DT) -> str | None:
    if given in WIDE and out in WIDE:
        return x if out == DT.FLOAT else f"{x}.to({STORE_TYPES[out]}).to(tl.float32)"
    if out in WIDE:
        return f"{x}.to(tl.float32)"
    if out == DT.BOOL:
        return f"({x} != 0)"
    return f"{x}.to({STORE_TYPES[out]})" if given not in WIDE else None


def _between(region: RegionView, node: ir.Node, args: list[str]) -> str | None:
    """QuantizeLinear or DequantizeLinear with one scale, between fp32 and bytes."""
    small = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    wide = node.outputs[0] if node.op_type == "DequantizeLinear" else node.inputs[0]
    numbers = [region.constant(v) for v in node.inputs[1:]]
    if any(n is None or n.numel() != 1 for n in numbers) or small is None or small.dtype not in BYTE_LIMITS:
        return None
    if wide is None or wide.dtype != DT.FLOAT or region.attrs(node).get("block_size", 0):
        return None
    scale, zero = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
    if node.op_type == "DequantizeLinear":
        return f"(({args[0]}.to(tl.int32) - ({zero})).to(tl.float32) * {literal(scale)})"
    low, high = BYTE_LIMITS[small.dtype]
    x, kind = args[0], STORE_TYPES[small.dtype]
    made = f"_quantized({x} / {literal(scale)}, {zero}, {low}, {high})"
    return f"tl.where({x} == {x}, {made}, 0).to({kind})"


def _clip(args: list[str]) -> str:
    out = args[0]
    if len(args) > 1 and args[1]:
        out = _maximum(out, args[1])
    if len(args) > 2 and args[2]:
        out = _minimum(out, args[2])
    return out


def _pow(region: RegionView, node: ir.Node, args: list[str]) -> str | None:
    weight = region.constant(node.inputs[1])
    if weight is None or weight.numel() != 1:
        return None
    exponent, x = float(weight.reshape(())), args[0]
    known = {2.0: f"({x} * {x})", 3.0: f"({x} * {x} * {x})", 1.0: x, 0.5: f"tl.sqrt_rn({x})", -1.0: f"(1.0 / {x})"}
    return known.get(exponent)


def comment(name: str | None) -> str:
    """A name of the model as a trailing comment: one printable line, whatever the model says."""
    return "  # " + re.sub(r"[^ -~]", "?", name or "")[:100]


@dataclass
class Body:
    """Statements that compute nodes from named values; `names` maps a value to the variable that holds it."""

    region: RegionView
    names: dict[ir.Value, str]
    lines: list[str] = field(default_factory=list)

    def add(self, node: ir.Node) -> bool:
        """Append the node's statement; False when it has no expression."""
        args = ["" if v is None else self.names[v] for v in node.inputs]
        text = expression(self.region, node, args)
        if text is None:
            return False
        name = f"v{len(self.names)}"
        self.names[node.outputs[0]] = name
        self.lines.append(f"{name} = {text}{comment(node.name or node.op_type)}")
        return True


def loaded(name: str, dtype: DT | None) -> str:
    """What a loaded value becomes before arithmetic: half types widen, bytes that mean booleans become them."""
    if dtype in (DT.FLOAT16, DT.BFLOAT16):
        return f"{name}.to(tl.float32)"
    return f"({name} != 0)" if dtype == DT.BOOL else name


def rounded(name: str, dtype: DT | None) -> str:
    """What is stored for a computed value."""
    if dtype in (DT.FLOAT16, DT.BFLOAT16):
        return f"{name}.to({STORE_TYPES[dtype]})"
    return f"{name}.to(tl.float8e4nv)" if dtype == FP8 else name
