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


def anchors_of(region: RegionView) -> list[ir.Node]:
    """The contractions of a Region, two in a pair."""
    return [n for n in region.nodes if not n.domain and n.op_type in _ANCHORS]


def parts_of(region: RegionView) -> tuple[PartView, PartView] | None:
    """Both halves of a pair of contractions, apart where the second one's anchor reads; None of anything else."""
    anchors = anchors_of(region)
    if region.kind != PAIR or len(anchors) != 2:
        return None
    between = anchors[1].inputs[0]
    while between is not None and (made := between.producer()) is not None and made.op_type == "DequantizeLinear":
        between = made.inputs[0]
    before = _behind(between)
    first = [n for n in region.nodes if n in before]
    second = [n for n in region.nodes if n not in before]
    if anchors[0] not in before:
        return None
    return PartView(region, first, _kind(first)), PartView(region, second, _kind(second))


def branches_of(region: RegionView) -> tuple[PartView, PartView] | None:
    """A contraction and another one that adds it to its own; None of anything else."""
    anchors = anchors_of(region)
    if region.kind != PAIR or len(anchors) != 2:
        return None
    for shortcut, other in (anchors, anchors[::-1]):
        users = [u for u, _ in shortcut.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Add" and shortcut.outputs[0] not in region.outputs:
            rest = [n for n in region.nodes if n is not shortcut]
            if rest[0] is other and shortcut not in _behind(other.outputs[0]) and rest[1:]:
                return PartView(region, [shortcut], "conv"), PartView(region, rest, "conv")
    return None


def _behind(value: ir.Value | None) -> set[ir.Node]:
    """Nodes that `value` is computed by."""
    found: set[ir.Node] = set()
    queue = [value]
    while queue:
        at = queue.pop()
        node = None if at is None else at.producer()
        if node is not None and node not in found:
            found.add(node)
            queue.extend(node.inputs)
    return found


def _kind(nodes: Sequence[ir.Node]) -> str:
    return "quantized" if any(n.op_type == "DequantizeLinear" for n in nodes) else "conv"
