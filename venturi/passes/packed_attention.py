"""Attention takes the Split of its queries, keys and values along: it reads them where one product has left them.

Only where heads lie side by side, and where the device's kernels read them so.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import get_attr, rank, static_shape
from venturi.ir.region import form_region
from venturi.passes.rewriting import PassContext, producer, single_use


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if not ctx.packed_attention or node.op_type != "Attention" or node.domain or rank(node.inputs[0]) != 3:
            continue
        split = producer(node.inputs[0], "Split")
        if split is None or len(split.outputs) != 3 or list(node.inputs[:3]) != list(split.outputs):
            continue
        alone = all(single_use(v) is node for v in split.outputs)
        known = all(v.shape is not None and isinstance(v.shape[-1], int) for v in split.outputs)
        if not alone or not known or get_attr(split, "axis", 0) not in (-1, 2) or static_shape(split.inputs[0]) is None:
            continue
        if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
            continue
        if not ctx.take():
            return
        form_region("attention", [split, node])
