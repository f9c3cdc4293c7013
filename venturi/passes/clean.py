"""Dead code removal and common subexpression elimination."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import captured, subgraphs
from venturi.ops.table import CONTROL, RANDOM, find_op
from venturi.passes.rewriting import PassContext, can_forward, replace_value


def remove_dead(graph: ir.Graph, ctx: PassContext) -> None:
    """Drop nodes and weights that no output depends on. Operators have no side effects, random ones included."""
    nested = {v for node in graph for sub in subgraphs(node) for v in captured(sub)}
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() or v in nested for v in node.outputs) and ctx.take():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and value not in nested and not value.is_graph_input():
            del graph.initializers[name]


def merge_duplicates(graph: ir.Graph, ctx: PassContext) -> None:
    """Two pure nodes with equal operator, attributes and inputs become one; equal small constants too."""
    _merge_constants(graph)
    seen: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph):
        op = find_op(node.domain, node.op_type)
        if op is None or {RANDOM, CONTROL} & op.traits or subgraphs(node):
            continue
        key = (
            node.domain,
            node.op_type,
            tuple(id(v) for v in node.inputs),
            len(node.outputs),
            _attributes(node),
        )
        first = seen.setdefault(key, node)
        if first is node or not all(can_forward(a, b) for a, b in zip(node.outputs, first.outputs)):
            continue
        if not ctx.take():
            return
        for old, new in zip(node.outputs, first.outputs):
            replace_value(old, new)
        graph.remove(node, safe=True)


def _attributes(node: ir.Node) -> tuple[tuple[str, str], ...]:
    def text(a: ir.Attr) -> str:
        if a.type == ir.AttributeType.TENSOR:
            tensor = a.as_tensor()
            if tensor.dtype == ir.DataType.STRING:
                return repr(tensor.numpy().tolist())
            return f"{tensor.dtype} {list(tensor.shape)} {tensor.tobytes().hex()}"
        return repr(a.value)

    return tuple(sorted((name, text(a)) for name, a in node.attributes.items()))


def _merge_constants(graph: ir.Graph, max_bytes: int = 1024) -> None:
    seen: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or value.dtype == ir.DataType.STRING:
            continue
        if tensor.nbytes > max_bytes:
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]
