"""A linear layer on flattened rows becomes one on the tensor as it is: Reshape, Gemm, Reshape becomes MatMul, Add.

What follows (a residual, an activation, a norm) then finds the layer's result itself, not a reshape of it.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import const_array, dim, get_attr, make_node, rank
from venturi.passes.rewriting import PassContext, producer, single_use, substitute


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain or node.graph is not graph:
            continue
        product = producer(node.inputs[0], "Gemm")
        flat = None if product is None else producer(product.inputs[0], "Reshape")
        if product is None or flat is None or not _plain(product):
            continue
        x = next((v for v in _unshaped(flat) if _restores(node, product, v)), None)
        if x is None:
            continue
        if not ctx.take():
            return
        weight, made = product.inputs[1], []
        if get_attr(product, "transB", 0):
            made.append(make_node("Transpose", [weight], {"perm": [1, 0]}))
            weight = made[-1].outputs[0]
        made.append(make_node("MatMul", [x, weight]))
        if len(product.inputs) > 2 and product.inputs[2] is not None:
            made.append(make_node("Add", [made[-1].outputs[0], product.inputs[2]]))
        substitute([flat, product, node], made, [(node.outputs[0], made[-1].outputs[0])])


def _plain(product: ir.Node) -> bool:
    """x times a constant matrix, plus a constant row if anything."""
    numbers = [get_attr(product, "alpha", 1.0), get_attr(product, "beta", 1.0), get_attr(product, "transA", 0)]
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    row = const_array(bias)
    known = product.inputs[1] is not None and product.inputs[1].const_value is not None
    return known and numbers == [1.0, 1.0, 0] and (bias is None or (row is not None and row.ndim == 1))


def _unshaped(flat: ir.Node) -> list[ir.Value]:
    """What a reshape reads, and what that is a reshape of."""
    found, node = [], flat
    while node is not None and node.inputs[0] is not None:
        found.append(node.inputs[0])
        node = producer(node.inputs[0], "Reshape")  # type: ignore[assignment]
    return found


def _restores(node: ir.Node, product: ir.Node, source: ir.Value) -> bool:
    """Whether the reshape behind the product gives its rows the shape of `source`, all but the last axis."""
    rows, out = product.inputs[0], node.outputs[0]
    if source.shape is None or out.shape is None or rank(source) != rank(out) or rank(out) == 0:
        return False
    if single_use(product.outputs[0]) is not node or rank(rows) != 2:
        return False
    kept = dim(source, -1) == dim(rows, -1) and dim(out, -1) == dim(product.outputs[0], -1)
    if not kept or dim(source, -1) is None or dim(out, -1) is None:
        return False
    pairs = list(zip(source.shape, out.shape))[:-1]
    return all((isinstance(a, int) or a.value is not None) and a == b for a, b in pairs)
