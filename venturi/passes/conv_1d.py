"""1-D convolutions as 2-D ones on images of one row, with the operators of their epilogue: then every kernel for images
serves them. Between two such convolutions nothing is reshaped."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from venturi.ir.build import const_array, constant, get_attr, int64s, make_node, rank
from venturi.passes.epilogue import chain_of
from venturi.passes.rewriting import PassContext, substitute

_ROW = 2


def run(graph: ir.Graph, ctx: PassContext) -> None:
    images: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.graph is not graph or not _is_1d(node):
            continue
        chain = chain_of(node, "conv")
        if not ctx.take():
            return
        _lift(graph, chain, images)


def _is_1d(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "Conv" and not node.domain else None
    return weight is not None and rank(node.inputs[0]) == 3 and weight.const_value is not None


def _lift(graph: ir.Graph, chain: list[ir.Node], images: dict[ir.Value, ir.Value]) -> None:
    """`images` has the 4-D form of values that were lifted before, and gets the chain's result."""
    conv, made = chain[0], []

    def image(value: ir.Value) -> ir.Value:
        if value not in images:
            made.append(make_node("Unsqueeze", [value, int64s(graph, [_ROW])]))
            images[value] = made[-1].outputs[0]
        return images[value]

    weight = const_array(conv.inputs[1])
    assert weight is not None
    assert conv.inputs[0] is not None
    row = constant(graph, weight[:, :, None, :], "weight")
    made.append(make_node("Conv", [image(conv.inputs[0]), row, *conv.inputs[2:]], _attributes(conv)))
    for before, node in pairwise(chain):
        last = made[-1].outputs[0]
        operands = [last if v is before.outputs[0] else image(v) if rank(v) == 3 and v else v for v in node.inputs]
        attributes = {name: get_attr(node, name) for name in node.attributes}
        made.append(make_node(node.op_type, operands, attributes))
    end = made[-1].outputs[0]
    made.append(make_node("Squeeze", [end, int64s(graph, [_ROW])]))
    result = chain[-1].outputs[0]
    substitute(chain, made, [(result, made[-1].outputs[0])])
    images[made[-1].outputs[0]] = end


def _attributes(conv: ir.Node) -> dict[str, object]:
    """Of the same convolution on one row."""
    found: dict[str, object] = {name: get_attr(conv, name) for name in conv.attributes if name != "kernel_shape"}
    for name in ("strides", "dilations"):
        found[name] = [1, *(get_attr(conv, name) or [1])]
    before, after = get_attr(conv, "pads") or [0, 0]
    if get_attr(conv, "auto_pad", "NOTSET") == "NOTSET":
        found["pads"] = [0, before, 0, after]
    return found
