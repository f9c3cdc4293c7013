"""Products that share an input and have constant weights become one product and a Split (QKV projections)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, constant, fresh_name, int64s, make_node, static_shape
from venturi.ir.marks import PRODUCTS
from venturi.ir.verify import sort_topologically
from venturi.passes.rewriting import PassContext, commuted, drop_dead, replace_value, single_use, sources


@dataclass(frozen=True)
class Branch:
    """One product of the group, with its constant bias when it has one."""

    product: ir.Node
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def last(self) -> ir.Node:
        return self.add or self.product


def run(graph: ir.Graph, ctx: PassContext) -> None:
    groups: dict[tuple[ir.Value, int], list[Branch]] = {}
    for node in graph:
        branch = _branch(node)
        if branch is not None and node.inputs[0] is not None:
            weight = node.inputs[1]
            assert weight is not None
            groups.setdefault((node.inputs[0], (static_shape(weight) or [0])[0]), []).append(branch)
    for (x, _), branches in groups.items():
        same = [b for b in branches if (b.bias is None) == (branches[0].bias is None)]
        if len(same) < 2 or any(b.product.graph is not graph for b in same):
            continue
        if not ctx.take():
            return
        _merge(graph, x, same)
    sort_topologically(graph)


def _branch(node: ir.Node) -> Branch | None:
    if node.op_type != "MatMul" or node.domain:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.is_graph_input() or len(weight.const_value.shape) != 2:
        return None
    if node.outputs[0].is_graph_output() or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    add = single_use(node.outputs[0])
    if add is not None and add.op_type == "Add" and not add.domain and not add.outputs[0].is_graph_output():
        for value, other in commuted(add):
            if (
                value is node.outputs[0]
                and other.const_value is not None
                and list(other.const_value.shape) == [weight.const_value.shape[1]]
            ):
                return Branch(node, add, other)
    return Branch(node, None, None)


def _merge(graph: ir.Graph, x: ir.Value, branches: list[Branch]) -> None:
    weights = [const_array(b.product.inputs[1]) for b in branches]
    joined = np.concatenate([w for w in weights if w is not None], axis=1)
    product = make_node("MatMul", [x, constant(graph, joined, "weight")], name=fresh_name("qkv"))
    sizes = [w.shape[1] for w in weights if w is not None]
    last, new = product.outputs[0], [product]
    shape = [*list(x.shape or [])[:-1], sum(sizes)]
    dtype = branches[0].product.outputs[0].type
    product.outputs[0].type, product.outputs[0].shape = dtype, ir.Shape(shape)
    if branches[0].bias is not None:
        bias = np.concatenate([a for b in branches if (a := const_array(b.bias)) is not None])
        add = make_node("Add", [last, constant(graph, bias, "bias")])
        add.outputs[0].type, add.outputs[0].shape = dtype, ir.Shape(shape)
        new.append(add)
        last = add.outputs[0]
    split = make_node("Split", [last, int64s(graph, sizes)], {"axis": -1}, num_outputs=len(branches))
    new.append(split)
    anchor = branches[0].product
    product.metadata_props.update({k: v for k, v in anchor.metadata_props.items() if k == PRODUCTS})
    for node in new:
        node.metadata_props["source"] = sources(*(n for b in branches for n in (b.product, b.last)))
        graph.insert_before(anchor, node)
    for out, branch in zip(split.outputs, branches):
        old = branch.last.outputs[0]
        out.type, out.shape = old.type, old.shape
        replace_value(old, out)
    for branch in branches:
        drop_dead([branch.last, branch.product])
