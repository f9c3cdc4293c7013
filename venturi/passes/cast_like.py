"""CastLike becomes Cast: the type is known, so the value that names it need not be there (nor block folding)."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import copy_type
from venturi.passes.rewriting import PassContext, replace_value


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        source, out = (node.inputs[0] if node.inputs else None), node.outputs[0]
        if node.op_type != "CastLike" or node.domain or source is None or out.dtype is None:
            continue
        if not ctx.take():
            return
        attributes = [ir.AttrInt64("to", int(out.dtype)), *node.attributes.values()]
        cast = ir.Node("", "Cast", [source], attributes, name=node.name, metadata_props=dict(node.metadata_props))
        copy_type(out, cast.outputs[0])
        graph.insert_before(node, cast)
        replace_value(out, cast.outputs[0])
        graph.remove(node, safe=True)
