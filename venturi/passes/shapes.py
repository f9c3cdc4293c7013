"""Simplifies chains of data movement and casts: transpose∘transpose, reshape∘reshape, cast∘cast, slice∘slice."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from venturi.ir.build import get_attr, int64s, ints, make_node, rank, static_shape
from venturi.ir.dtypes import FLOATS, INTS
from venturi.passes.rewriting import PassContext, producer, substitute

DT = ir.DataType
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_WIDTH = {DT.FLOAT16: 16, DT.BFLOAT16: 16, DT.FLOAT: 32, DT.DOUBLE: 64}


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        rule = _RULES.get(node.op_type) if not node.domain and node.graph is graph else None
        new = rule(node, graph) if rule else None
        if new is None:
            continue
        if not ctx.take():
            return
        substitute([node], [new], [(node.outputs[0], new.outputs[0])])


def _transposes(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    first = producer(node.inputs[0], "Transpose")
    if first is None:
        return None
    outer, inner = get_attr(node, "perm"), get_attr(first, "perm")
    if outer is None or inner is None:
        return None
    return make_node("Transpose", [first.inputs[0]], {"perm": [inner[p] for p in outer]})


def _reshapes(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """A reshape of a reshape needs only the second, when its target is fully known or has one free dimension."""
    first = producer(node.inputs[0], *_RESHAPES)
    if first is None:
        return None
    target = _target(node)
    return None if target is None else make_node("Reshape", [first.inputs[0], int64s(graph, target)])


def _target(node: ir.Node) -> list[int] | None:
    out = node.outputs[0]
    if out.shape is not None:
        dims = [d if isinstance(d, int) else -1 for d in out.shape]
        if dims.count(-1) <= 1 and 0 not in dims:
            return dims
    if node.op_type == "Reshape" and not get_attr(node, "allowzero", 0):
        shape = ints(node.inputs[1])
        if shape is not None and 0 not in shape:
            return shape
    return None


def _casts(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """The inner cast may go when it only widened: every value survives it exactly."""
    first = producer(node.inputs[0], "Cast")
    if first is None or first.inputs[0] is None or first.inputs[0].dtype is None:
        return None
    source, middle = first.inputs[0].dtype, first.outputs[0].dtype
    if middle is None or not widens(source, middle):
        return None
    return make_node("Cast", [first.inputs[0]], {k: get_attr(node, k) for k in node.attributes})


def widens(source: DT, target: DT) -> bool:
    """Every value of `source` is a value of `target`."""
    if source in FLOATS and target in FLOATS:
        return _WIDTH[target] > _WIDTH[source] or source == target
    if source == DT.BOOL:
        return target in INTS or target in FLOATS
    if source in INTS and target in INTS:
        import numpy as np

        return bool(np.can_cast(source.numpy(), target.numpy(), "safe"))
    return False


def _slices(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """Slices of disjoint axes with constant bounds merge into one."""
    first = producer(node.inputs[0], "Slice")
    r = rank(node.inputs[0])
    if first is None or r is None or len(first.outputs[0].uses()) > 1:
        return None
    a, b = _bounds(first, r), _bounds(node, r)
    if a is None or b is None or set(a) & set(b):
        return None
    both = a | b
    axes = sorted(both)
    columns = [int64s(graph, [both[x][i] for x in axes]) for i in range(3)]
    return make_node("Slice", [first.inputs[0], columns[0], columns[1], int64s(graph, axes), columns[2]])


def _bounds(node: ir.Node, r: int) -> dict[int, tuple[int, int, int]] | None:
    starts, ends = ints(node.inputs[1]), ints(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes = ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(len(starts)))
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(starts)
    if axes is None or steps is None:
        return None
    return {a % r: (s, e, st) for a, s, e, st in zip(axes, starts, ends, steps)}


def _as_reshape(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """Transposes that only move axes of size one are reshapes."""
    merged = _transposes(node, graph)
    if merged is not None:
        return merged
    shape, perm = static_shape(node.inputs[0]), get_attr(node, "perm")
    if shape is None or perm is None:
        return None
    moved = [p for p in perm if shape[p] != 1]
    if moved != sorted(moved) or 0 in shape or perm == list(range(len(perm))):
        return None
    return make_node("Reshape", [node.inputs[0], int64s(graph, [shape[p] for p in perm])])


_RULES: dict[str, Callable[[ir.Node, ir.Graph], ir.Node | None]] = {
    "Transpose": _as_reshape,
    "Reshape": _reshapes,
    "Flatten": _reshapes,
    "Squeeze": _reshapes,
    "Unsqueeze": _reshapes,
    "Cast": _casts,
    "Slice": _slices,
}
