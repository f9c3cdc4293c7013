"""Recognizes scaled dot-product attention spelled out in products and softmax, grouped heads included."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from venturi.ir.build import dim, get_attr, int64s, make_node, rank, scalar
from venturi.passes.rewriting import PassContext, commuted, producer, substitute


@dataclass
class Match:
    """What one attention reads; `nodes` are the matched ones in topological order, `core` those from the first
    product to the softmax, whose values nobody else may read."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    k_perm: list[int] | None
    mask: ir.Value | None = None
    scale: float = 1.0
    nodes: list[ir.Node] = field(default_factory=list)
    core: list[ir.Node] = field(default_factory=list)


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain or node.graph is not graph:
            continue
        found = _match(node)
        if found is None or not _closed(found, node):
            continue
        if not ctx.take():
            return
        _rewrite(graph, found, node)


def _closed(found: Match, root: ir.Node) -> bool:
    inside = {*found.nodes, root}
    return all(not v.is_graph_output() and all(u in inside for u, _ in v.uses()) for n in found.core for v in n.outputs)


def _match(root: ir.Node) -> Match | None:
    """root = softmax(scale * q @ k^T + mask) @ v over rank 3 or 4."""
    weights, v = root.inputs[0], root.inputs[1]
    r = rank(v)
    if v is None or r not in (3, 4) or rank(weights) != r:
        return None
    nodes: list[ir.Node] = []
    softmax = _softmax(weights, nodes)
    if softmax is None or get_attr(softmax, "axis", -1) not in (-1, r - 1):
        return None
    nodes.append(softmax)
    scores, mask, scale = softmax.inputs[0], None, 1.0
    add = producer(scores, "Add")
    if add is not None:
        for a, b in commuted(add):
            if producer(a, "MatMul", "Mul", "Div") is not None and _leads_to_matmul(a):
                scores, mask = a, b
                nodes.append(add)
                break
        else:
            return None
    scores, scale = _peel(scores, nodes)
    product = producer(scores, "MatMul")
    if product is None or product.inputs[0] is None:
        return None
    nodes.append(product)
    core = list(nodes)
    q, q_scale = _peel(product.inputs[0], nodes)
    kt, k_scale = _peel(product.inputs[1], nodes)
    swapped = _transposed(kt, r)
    if q is None or swapped is None or rank(q) != r:
        return None
    source, perm = swapped
    k, after_scale = _peel(source, nodes)
    if k is None or (mask is not None and not _covers(mask, softmax.outputs[0], r)):
        return None
    if not (q.dtype == k.dtype == v.dtype):
        return None
    total = scale * q_scale * k_scale * after_scale
    return Match(q, k, v, None if perm == list(range(r)) else perm, mask, total, nodes[::-1], core)


def _transposed(value: ir.Value | None, r: int) -> tuple[ir.Value, list[int]] | None:
    """(k, perm) with value = transpose(transpose(k, perm), last two axes): one Transpose, or torch's 3-D detour."""
    node = producer(value, "Transpose")
    if node is not None and node.inputs[0] is not None:
        perm = get_attr(node, "perm") or list(range(r))[::-1]
        return node.inputs[0], [*perm[:-2], perm[-1], perm[-2]]
    outer = producer(value, "Reshape")
    middle = producer(outer.inputs[0], "Transpose") if outer is not None else None
    first = producer(middle.inputs[0], "Reshape") if middle is not None else None
    if value is None or middle is None or first is None or get_attr(middle, "perm") != [0, 2, 1]:
        return None
    k = first.inputs[0]
    if k is None or rank(k) != 4 or r != 4 or value.shape is None or k.shape is None:
        return None
    a, b = list(k.shape), list(value.shape)
    if [a[0], a[1], a[3], a[2]] != b or any(not isinstance(d, int) and d.value is None for d in b):
        return None
    inner = first.outputs[0].shape
    if inner is None or [inner[1], inner[2]] != [a[2], a[3]]:
        return None
    return k, [0, 1, 2, 3]


def _covers(mask: ir.Value, scores: ir.Value, r: int) -> bool:
    """Attention pads a mask that is short in its last axis, so that axis must be as long as the scores'."""
    if mask.shape is None or scores.shape is None or not 2 <= len(mask.shape) <= r:
        return False
    last = scores.shape[-1]
    return bool(mask.shape[-1] == last) and (isinstance(last, int) or last.value is not None)


def _softmax(value: ir.Value | None, nodes: list[ir.Node]) -> ir.Node | None:
    """The Softmax behind `value`, seen through the guard Where(IsNaN(p), 0, p) that torch's exporter adds."""
    found = producer(value, "Softmax")
    if found is not None:
        return found
    guard = producer(value, "Where")
    if guard is None or scalar(guard.inputs[1]) != 0.0:
        return None
    test, found = producer(guard.inputs[0], "IsNaN"), producer(guard.inputs[2], "Softmax")
    if test is None or found is None or test.inputs[0] is not found.outputs[0]:
        return None
    nodes.extend([guard, test])
    return found


def _leads_to_matmul(value: ir.Value | None) -> bool:
    inner, _ = _peel(value, [])
    return producer(inner, "MatMul") is not None


def _peel(value: ir.Value | None, nodes: list[ir.Node]) -> tuple[ir.Value | None, float]:
    """Take constant factors off: (x * c) or (x / c)."""
    factor = 1.0
    while True:
        node = producer(value, "Mul", "Div")
        if node is None:
            return value, factor
        found = None
        for a, b in commuted(node) if node.op_type == "Mul" else [(node.inputs[0], node.inputs[1])]:
            c = scalar(b)
            if c and a is not None:
                found = a, c if node.op_type == "Mul" else 1.0 / c
                break
        if found is None:
            return value, factor
        nodes.append(node)
        value, factor = found[0], factor * found[1]


def _unrepeat(value: ir.Value, heads: int | None) -> ir.Value:
    """The key/value heads before they were repeated for grouped queries: Reshape(Expand(Unsqueeze(x, 2)))."""
    outer = producer(value, "Reshape")
    wide = producer(outer.inputs[0], "Expand") if outer is not None else None
    thin = producer(wide.inputs[0], "Unsqueeze", "Reshape") if wide is not None else None
    if thin is None or wide is None or thin.inputs[0] is None or heads is None:
        return value
    x = thin.inputs[0]
    own, groups = dim(x, 1), dim(wide.outputs[0], 2)
    same = rank(x) == 4 and rank(wide.outputs[0]) == 5 and dim(thin.outputs[0], 2) == 1
    if not same or own is None or groups is None or own * groups != heads or dim(wide.outputs[0], 1) != own:
        return value
    if dim(value, 1) != heads or dim(x, 3) != dim(value, 3):
        return value
    return x


def _rewrite(graph: ir.Graph, found: Match, root: ir.Node) -> None:
    new: list[ir.Node] = []

    def emit(op_type: str, inputs: list[ir.Value | None], attrs: dict[str, object] | None = None) -> ir.Value:
        node = make_node(op_type, inputs, attrs)
        new.append(node)
        return node.outputs[0]

    q, k, v, mask = found.q, found.k, found.v, found.mask
    flat = rank(v) == 3
    if found.k_perm is not None:
        k = emit("Transpose", [k], {"perm": found.k_perm})
    elif not flat:
        k = _unrepeat(k, dim(q, 1))
    if not flat:
        shared = _unrepeat(v, dim(q, 1))
        if dim(shared, 1) == dim(k, 1):
            v = shared
        elif k is not found.k and found.k_perm is None:
            k = found.k
    if flat:
        axis = int64s(graph, [0])
        q, k, v = (emit("Unsqueeze", [x, axis]) for x in (q, k, v))
        if mask is not None and rank(mask) == 3:
            mask = emit("Unsqueeze", [mask, axis])
    inputs = [q, k, v, *([mask] if mask is not None else [])]
    core = make_node("Attention", inputs, {"scale": found.scale}, name=root.name)
    new.append(core)
    out = core.outputs[0]
    if flat:
        out = emit("Squeeze", [out, int64s(graph, [0])])
    substitute([*found.nodes, root], new, [(root.outputs[0], out)])
