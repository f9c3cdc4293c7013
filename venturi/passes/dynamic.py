"""Dynamic quantization: a product whose first operand is rounded by its own range becomes one Region.

From DynamicQuantizeLinear, DequantizeLinear of it and of int8 weights, to what follows the product: numbers in, numbers
out. Other readers of the rounded operand (queries, keys and values have one) keep their own.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import copy_type, fresh_name, get_attr
from venturi.ir.dtypes import DT
from venturi.ir.region import form_region
from venturi.passes.epilogue import chain_of
from venturi.passes.rewriting import PassContext, drop_dead, producer, sources


def run(graph: ir.Graph, ctx: PassContext) -> None:
    if not ctx.fuses_dynamic:
        return
    for node in list(graph):
        if node.domain or node.op_type not in ("MatMul", "Gemm") or node.graph is not graph:
            continue
        found = _rounded(node)
        if found is None:
            continue
        if not ctx.take():
            return
        rounds, back, weight = found
        chain = chain_of(node, "gemm")
        own = [_copied(graph, n, chain[0]) for n in (rounds, back, weight)]
        for i, value in enumerate(rounds.outputs):
            own[1].replace_input_with(i, own[0].outputs[i])
            copy_type(value, own[0].outputs[i])
        for i, copy in enumerate(own[1:]):
            node.replace_input_with(i, copy.outputs[0])
        form_region("dynamic", [*own, *chain])
        drop_dead([weight, back, rounds])


def _rounded(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """(DynamicQuantizeLinear, DequantizeLinear of it, DequantizeLinear of the weights) of a product."""
    back, weight = (producer(v, "DequantizeLinear") for v in node.inputs[:2])
    if back is None or weight is None or get_attr(node, "transA", 0):
        return None
    rounds = producer(back.inputs[0], "DynamicQuantizeLinear")
    stored = weight.inputs[0]
    if rounds is None or list(back.inputs) != list(rounds.outputs) or stored is None:
        return None
    return (rounds, back, weight) if stored.const_value is not None and stored.dtype == DT.INT8 else None


def _copied(graph: ir.Graph, node: ir.Node, before: ir.Node) -> ir.Node:
    copy = ir.Node("", node.op_type, list(node.inputs), list(node.attributes.values()), num_outputs=len(node.outputs))
    copy.metadata_props["source"] = sources(node)
    for old, new in zip(node.outputs, copy.outputs):
        new.name = fresh_name(old.name or "real")
        copy_type(old, new)
    graph.insert_before(before, copy)
    return copy
