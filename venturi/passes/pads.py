"""Folds a constant Pad of spatial axes into the convolution or pooling that reads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from venturi.ir.build import get_attr, ints, make_node, rank, scalar
from venturi.passes.rewriting import PassContext, producer, single_use, substitute


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.domain or node.op_type not in ("Conv", "AveragePool", "MaxPool") or node.graph is not graph:
            continue
        pad = producer(node.inputs[0], "Pad")
        if pad is None or single_use(pad.outputs[0]) is not node or len(node.outputs) > 1:
            continue
        extra = _spatial_pads(pad, node.op_type)
        if extra is None or get_attr(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
            continue
        own = get_attr(node, "pads") or [0] * len(extra)
        if node.op_type == "AveragePool" and (
            get_attr(node, "ceil_mode", 0) or (any(own) and not get_attr(node, "count_include_pad", 0))
        ):
            continue
        if node.op_type == "MaxPool" and get_attr(node, "ceil_mode", 0):
            continue
        if not ctx.take():
            return
        attrs = {k: get_attr(node, k) for k in node.attributes if k != "auto_pad"}
        attrs["pads"] = [a + b for a, b in zip(own, extra)]
        if node.op_type == "AveragePool":
            attrs["count_include_pad"] = 1
        new = make_node(node.op_type, [pad.inputs[0], *node.inputs[1:]], attrs, name=node.name)
        substitute([pad, node], [new], [(node.outputs[0], new.outputs[0])])


def _spatial_pads(pad: ir.Node, user: str) -> list[int] | None:
    """[begins, ends] of the spatial axes, when nothing else is padded and the value is the user's neutral one."""
    r, amounts = rank(pad.inputs[0]), ints(pad.inputs[1])
    if r is None or amounts is None or get_attr(pad, "mode", "constant") != "constant" or min(amounts, default=0) < 0:
        return None
    value = 0.0
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        found = scalar(pad.inputs[2])
        if found is None:
            return None
        value = found
    if value != (-np.inf if user == "MaxPool" else 0.0):
        return None
    axes = list(range(r))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        given = ints(pad.inputs[3])
        if given is None:
            return None
        axes = [a % r for a in given]
    begin, end = [0] * r, [0] * r
    for i, a in enumerate(axes):
        begin[a], end[a] = amounts[i], amounts[i + len(axes)]
    if any(begin[:2]) or any(end[:2]):
        return None
    return begin[2:] + end[2:]
