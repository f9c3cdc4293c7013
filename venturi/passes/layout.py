"""Assigns NHWC to convolution nets: channels last in memory, logical NCHW in the graph, no transposes anywhere.

A node is marked when it computes a 4-D activation and is linked to a convolution through 4-D values. Backends keep
marked values channels-last; the only reorder left is the one at the graph's own inputs.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import rank
from venturi.ir.marks import LAYOUT, NHWC
from venturi.ir.region import members
from venturi.passes.rewriting import PassContext

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


def run(graph: ir.Graph, ctx: PassContext) -> None:
    """Marks nothing when the graph has fewer than two 2-D convolutions: a single one may as well stay NCHW."""
    nodes = [n for n in graph if any(rank(v) == 4 for v in n.outputs)]
    convolutions = [n for n in nodes if any(m.op_type in _CONVOLUTIONS for m in members(n))]
    if len(convolutions) < 2:
        return
    linked: set[ir.Node] = set()
    queue = list(convolutions)
    while queue:
        node = queue.pop()
        if node in linked:
            continue
        linked.add(node)
        for value in node.outputs:
            if rank(value) == 4:
                queue.extend(u for u, _ in value.uses() if u.graph is graph and any(rank(v) == 4 for v in u.outputs))
    for node in graph:
        if node in linked:
            if not ctx.take():
                return
            node.metadata_props[LAYOUT] = NHWC
