"""Two Regions that became one of kind "pair", seen apart."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from venturi.backends.base import RegionView

PAIR = "pair"
_ANCHORS = frozenset({"Conv", "MatMul", "Gemm"})


class PartView(RegionView):
    """Some of a Region's nodes as a Region of their own: what the others compute for them is an input."""

    def __init__(self, whole: RegionView, nodes: Sequence[ir.Node], kind: str) -> None:
        self.node, self.weights, self.kind, self.nodes = whole.node, whole.weights, kind, list(nodes)
        inside = set(nodes)
        read = [v for n in nodes for v in n.inputs if v is not None and v.producer() not in inside]
        self.formal = list(dict.fromkeys(read))
        self._outer = {v: whole.outer(v) or v for v in read}
        self.dynamic = [v for v in self.formal if v is not None and not self.is_constant(v)]
        made = [v for n in nodes for v in n.outputs]
        given = set(whole.outputs)
        self.outputs = [v for v in made if v in given or any(u not in inside for u, _ in v.uses())]


def parts_of(region: RegionView) -> tuple[PartView, PartView] | None:
    """Both halves of a pair of plain contractions, split where the second one's anchor is; None of anything else."""
    anchors = [i for i, n in enumerate(region.nodes) if not n.domain and n.op_type in _ANCHORS]
    if region.kind != PAIR or len(anchors) != 2 or anchors[0]:
        return None
    first, second = region.nodes[: anchors[1]], region.nodes[anchors[1] :]
    return PartView(region, first, "conv"), PartView(region, second, "conv")
