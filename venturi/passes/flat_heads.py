"""Has attention read and write tokens as the linear layers around it do: heads side by side, nothing transposed.

Attention(Transpose(x)) with x [batch, tokens, heads, dim] becomes attention over [batch, tokens, heads * dim]. Only
where the device's kernels take either form.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import dim, get_attr, int64s, make_node, rank
from venturi.passes.rewriting import PassContext, producer, single_use, substitute

_SWAP = [0, 2, 1, 3]


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if not ctx.flat_attention or node.op_type != "Attention" or node.domain or rank(node.inputs[0]) != 4:
            continue
        if len(node.outputs) > 1 or any(v is not None for v in node.inputs[4:]):
            continue
        turns = [_turned(v) for v in node.inputs[:3]]
        sizes = [(dim(v, 1), dim(v, 3)) for v in node.inputs[:3]]
        if any(t is None for t in turns) or any(None in s for s in sizes):
            continue
        if not ctx.take():
            return
        _rewrite(graph, node, [t for t in turns if t is not None], [(h or 0, d or 0) for h, d in sizes])


def _turned(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is x [batch, tokens, heads, dim] with tokens and heads swapped."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and get_attr(node, "perm") == _SWAP else None


def _rewrite(graph: ir.Graph, node: ir.Node, turned: list[ir.Value], sizes: list[tuple[int, int]]) -> None:
    flat = [make_node("Reshape", [x, int64s(graph, [0, 0, heads * width])]) for x, (heads, width) in zip(turned, sizes)]
    attrs = {k: a.value for k, a in node.attributes.items()}
    attrs |= {"q_num_heads": sizes[0][0], "kv_num_heads": sizes[1][0]}
    made = make_node("Attention", [*(n.outputs[0] for n in flat), *node.inputs[3:]], attrs)
    heads = make_node("Reshape", [made.outputs[0], int64s(graph, [0, 0, sizes[0][0], sizes[2][1]])])
    after = single_use(node.outputs[0])
    if after is not None and after.op_type == "Transpose" and not after.domain and get_attr(after, "perm") == _SWAP:
        substitute([node, after], [*flat, made, heads], [(after.outputs[0], heads.outputs[0])])
        return
    back = make_node("Transpose", [heads.outputs[0]], {"perm": _SWAP})
    substitute([node], [*flat, made, heads, back], [(node.outputs[0], back.outputs[0])])
