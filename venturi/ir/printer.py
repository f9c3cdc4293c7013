"""One line per node, for people and for golden tests."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import get_attr
from venturi.ir.dtypes import short_name
from venturi.ir.region import body_of, is_region, kind_of


def format_value(value: ir.Value | None) -> str:
    if value is None:
        return "_"
    shape = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
    return f"%{value.name}:{short_name(value.dtype)}[{shape}]"


def format_node(node: ir.Node, indent: str = "") -> str:
    left = ", ".join(format_value(v) for v in node.outputs)
    right = ", ".join("_" if v is None else f"%{v.name}" for v in node.inputs)
    if is_region(node):
        lines = [f"{indent}{left} = Region<{kind_of(node)}>({right})"]
        lines += [format_node(n, indent + "    ") for n in body_of(node)]
        return "\n".join(lines)
    attrs = []
    for name, a in node.attributes.items():
        if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.TENSOR):
            attrs.append(f"{name}=<{a.type.name.lower()}>")
        else:
            attrs.append(f"{name}={get_attr(node, name)}")
    domain = f"{node.domain}::" if node.domain else ""
    return f"{indent}{left} = {domain}{node.op_type}({right}){{{', '.join(attrs)}}}"


def format_graph(graph: ir.Graph) -> str:
    """Text of the whole graph: inputs, number of weights, nodes, outputs."""
    lines = [f"graph {graph.name or ''}({', '.join(format_value(v) for v in graph.inputs)})"]
    lines.append(f"  # {len(graph.initializers)} initializers")
    lines += [format_node(n, "  ") for n in graph]
    lines.append(f"  return {', '.join(format_value(v) for v in graph.outputs)}")
    return "\n".join(lines)
