"""Groups pointwise nodes, and the reductions among them, into Regions: trees along values that have one reader."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import subgraphs
from venturi.ir.dtypes import FLOATS
from venturi.ir.quantization import per_tensor
from venturi.ir.region import form_region
from venturi.ops.table import POINTWISE, find_op
from venturi.passes.rewriting import PassContext, single_use

REDUCTIONS = frozenset({"Softmax", "LayerNormalization", "RMSNormalization", "LogSoftmax"})
MAX_NODES = 32


def run(graph: ir.Graph, ctx: PassContext) -> None:
    """A cluster has one output, so nothing outside can sit between its nodes: it can never make a cycle."""
    order = {node: i for i, node in enumerate(graph)}
    cluster_of: dict[ir.Node, list[ir.Node]] = {}
    for node in graph:
        if not _joins(node, ctx):
            continue
        own = [node]
        reductions = int(node.op_type in REDUCTIONS)
        for value in node.inputs:
            source = None if value is None else value.producer()
            other = cluster_of.get(source) if source is not None else None
            if other is None or value is None or single_use(value) is not node or any(n in own for n in other):
                continue
            more = sum(n.op_type in REDUCTIONS for n in other)
            if len(own) + len(other) > MAX_NODES or reductions + more > 1:
                continue
            own = other + own
            reductions += more
        for member in own:
            cluster_of[member] = own
    done: set[int] = set()
    for cluster in list(cluster_of.values()):
        if id(cluster) in done or len(cluster) < 2:
            continue
        done.add(id(cluster))
        if not ctx.take():
            return
        kind = "reduce" if any(n.op_type in REDUCTIONS for n in cluster) else "pointwise"
        form_region(kind, sorted(cluster, key=order.__getitem__))


def _joins(node: ir.Node, ctx: PassContext) -> bool:
    """Single-output numeric pointwise nodes with at least one input that is not constant."""
    op = find_op(node.domain, node.op_type)
    if op is None or len(node.outputs) != 1 or subgraphs(node) or not node.inputs:
        return False
    between = node.op_type in ("QuantizeLinear", "DequantizeLinear") and ctx.fuses_quantized and per_tensor(node)
    if POINTWISE not in op.traits and node.op_type not in REDUCTIONS and not between:
        return False
    if any(v is not None and (v.dtype is None or v.dtype == ir.DataType.STRING) for v in (*node.inputs, *node.outputs)):
        return False
    numeric = all(v.dtype in FLOATS for v in node.outputs) or node.op_type not in REDUCTIONS
    return numeric and any(v is not None and v.const_value is None for v in node.inputs)
