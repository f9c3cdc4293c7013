"""Removes nodes that do nothing: Identity, inference Dropout, same-type Cast, x+0, x*1, and no-op data movement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, get_attr, ints, scalar, static_shape
from venturi.passes.rewriting import PassContext, can_forward, replace_value

Check = Callable[[ir.Node], int | None]


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        check = _CHECKS.get(node.op_type) if not node.domain else None
        index = check(node) if check else None
        if index is None:
            continue
        source, out = node.inputs[index], node.outputs[0]
        if (
            source is None
            or not can_forward(out, source)
            or any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
        ):
            continue
        if not ctx.take():
            return
        replace_value(out, source)
        graph.remove(node, safe=True)


def _always(node: ir.Node) -> int | None:
    return 0


def _one_input(node: ir.Node) -> int | None:
    return 0 if len(node.inputs) == 1 else None


def _dropout(node: ir.Node) -> int | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return 0 if training is None or scalar(training) == 0 else None


def _cast(node: ir.Node) -> int | None:
    source = node.inputs[0]
    return 0 if source is not None and source.dtype is not None and int(source.dtype) == get_attr(node, "to") else None


def _same_shape(node: ir.Node) -> int | None:
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    return 0 if before is not None and before == after else None


def _transpose(node: ir.Node) -> int | None:
    perm = get_attr(node, "perm")
    return 0 if perm is not None and perm == list(range(len(perm))) else None


def _slice(node: ir.Node) -> int | None:
    """Every axis is taken whole: start 0, end INT_MAX, step 1."""
    starts, ends = ints(node.inputs[1]), ints(node.inputs[2])
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(starts or [])
    if starts is None or ends is None or steps is None:
        return None
    whole = all(s == 0 for s in starts) and all(e >= 2**31 - 1 for e in ends) and all(s == 1 for s in steps)
    return 0 if whole else None


def _pad(node: ir.Node) -> int | None:
    pads = ints(node.inputs[1])
    return 0 if pads is not None and not any(pads) else None


def _neutral(value: float, commutes: bool) -> Check:
    def check(node: ir.Node) -> int | None:
        for index in (1, 0) if commutes else (1,):
            array, other = const_array(node.inputs[index], 65536), node.inputs[1 - index]
            if array is None or other is None or array.dtype.kind not in "fiu" or not np.all(array == value):
                continue
            if value == 0 and array.dtype.kind == "f" and np.signbit(array).any() != (node.op_type == "Add"):
                continue
            if _keeps_shape(other, node.outputs[0], list(array.shape)):
                return 1 - index
        return None

    return check


def _keeps_shape(source: ir.Value, out: ir.Value, extra: list[int]) -> bool:
    """True when broadcasting with a constant of shape `extra` cannot change the source's shape."""
    if source.dtype != out.dtype or source.shape is None or len(extra) > len(source.shape):
        return False
    return all(d == 1 or d == s for d, s in zip(reversed(extra), reversed(list(source.shape))))


_CHECKS: dict[str, Check] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _same_shape,
    "Flatten": _same_shape,
    "Expand": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
    "Concat": _one_input,
    "Sum": _one_input,
    "Max": _one_input,
    "Min": _one_input,
    "Mean": _one_input,
    "Add": _neutral(0.0, True),
    "Sub": _neutral(0.0, False),
    "Mul": _neutral(1.0, True),
    "Div": _neutral(1.0, False),
}
