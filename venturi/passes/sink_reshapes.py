"""Moves a reshape between a contraction and a unary pointwise operator behind the operator, where it is out of the way
of the fusion: Reshape(x) -> Gelu becomes Gelu(x) -> Reshape."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ops.table import POINTWISE, find_op
from venturi.passes.rewriting import PassContext, producer, single_use, substitute

_CONTRACTIONS = ("MatMul", "Gemm", "Conv")


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        reshape = _movable(node) if node.graph is graph else None
        if reshape is None:
            continue
        if not ctx.take():
            return
        moved = ir.Node("", node.op_type, [reshape.inputs[0]], list(node.attributes.values()))
        shaped = ir.Node("", "Reshape", [moved.outputs[0], reshape.inputs[1]], list(reshape.attributes.values()))
        substitute([reshape, node], [moved, shaped], [(node.outputs[0], shaped.outputs[0])])


def _movable(node: ir.Node) -> ir.Node | None:
    """The reshape before a unary pointwise operator, when only that reads it and a contraction feeds it."""
    op = find_op(node.domain, node.op_type)
    if node.domain or op is None or POINTWISE not in op.traits or len(node.inputs) != 1 or node.op_type == "Cast":
        return None
    reshape = producer(node.inputs[0], "Reshape")
    if reshape is None or single_use(reshape.outputs[0]) is not node:
        return None
    source = reshape.inputs[0]
    if source is None or single_use(source) is None:
        return None
    biased = producer(source, "Add")
    feeders = [source] if biased is None else list(biased.inputs)
    return reshape if any(producer(v, *_CONTRACTIONS) is not None for v in feeders) else None
