"""A Region: one node of domain `venturi` whose body graph holds the nodes that one kernel computes.

Its inputs feed the body's inputs by position, its outputs are the body's. The meaning of a Region is its body.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from venturi.ir.build import attr, copy_type, fresh_name

DOMAIN = "venturi"
REGION = "Region"


def is_region(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == REGION


def body_of(region: ir.Node) -> ir.Graph:
    return region.attributes["body"].as_graph()


def kind_of(region: ir.Node) -> str:
    return str(region.attributes["kind"].as_string())


def members(node: ir.Node) -> list[ir.Node]:
    """The nodes a kernel for `node` computes: the body of a Region, or the node itself."""
    return list(body_of(node)) if is_region(node) else [node]


def source_names(node: ir.Node) -> list[str]:
    """Names of the model's nodes this node stands for, kept through fusions in metadata `source`."""
    names: list[str] = []
    for member in members(node):
        names.extend(member.metadata_props.get("source", member.name or member.op_type).split("|"))
    return list(dict.fromkeys(names))


def form_region(kind: str, nodes: Sequence[ir.Node]) -> ir.Node:
    """Move `nodes` (in topological order, of one graph) into the body of a new Region in their place.

    Values used outside (or graph outputs) become the Region's outputs; everything read from outside, weights
    included, becomes its inputs. The Region is inserted where the last node was.
    """
    graph = nodes[-1].graph
    assert isinstance(graph, ir.Graph)
    inside = set(nodes)
    produced = [o for n in nodes for o in n.outputs]
    inputs: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.producer() not in inside and value not in inputs:
                formal = ir.Value(name=fresh_name(value.name or "in"))
                copy_type(value, formal)
                inputs[value] = formal
    outputs = [v for v in produced if v.is_graph_output() or any(u not in inside for u, _ in v.uses())]
    anchor = nodes[-1]
    region_outputs = []
    for value in outputs:
        outer = ir.Value(name=value.name)
        copy_type(value, outer)
        value.name = fresh_name(value.name or "out")
        region_outputs.append(outer)
    mapping = dict(zip(outputs, region_outputs))
    region = ir.Node(DOMAIN, REGION, list(inputs), [attr("kind", kind)], outputs=region_outputs, name=fresh_name(kind))
    graph.insert_after(anchor, region)
    for inner, outer in mapping.items():
        for user, index in list(inner.uses()):
            if user not in inside:
                user.replace_input_with(index, outer)
        for i, out in enumerate(graph.outputs):
            if out is inner:
                graph.outputs[i] = outer
    graph.remove(list(nodes))
    for node in nodes:
        for i, value in enumerate(node.inputs):
            if value is not None and value in inputs:
                node.replace_input_with(i, inputs[value])
    body = ir.Graph(list(inputs.values()), outputs, nodes=list(nodes), name="body")
    region.attributes["body"] = ir.AttrGraph("body", body)
    return region


def dissolve(region: ir.Node) -> list[ir.Node]:
    """Put the body's nodes in the Region's place; the opposite of form_region. Values keep the outer names."""
    graph, body = region.graph, body_of(region)
    assert isinstance(graph, ir.Graph)
    nodes, made = list(body), list(body.outputs)
    body.outputs.clear()
    body.remove(nodes)
    for formal, outer in zip(body.inputs, region.inputs):
        assert outer is not None
        ir.convenience.replace_all_uses_with(formal, outer)
    for inner, outer in zip(made, region.outputs):
        name, outer.name = outer.name, None
        ir.convenience.replace_all_uses_with(outer, inner, replace_graph_outputs=True)
        inner.name = name
    graph.insert_after(region, nodes)
    graph.remove(region, safe=True)
    return nodes
