"""Quantized models (Q/DQ): what only moves or compares numbers works on integers, contractions keep both ends.

DequantizeLinear -> MaxPool, Reshape, Transpose or Flatten becomes the operator on integers, dequantized afterwards:
they keep the order of numbers and make none. A QuantizeLinear that undoes the DequantizeLinear in front of it goes.
A convolution or product of dequantized operands becomes a Region from its DequantizeLinear nodes to the QuantizeLinear
behind it, bias, residual and activation in between; other readers of a dequantized value keep their own.

Only for devices whose kernels take integers in and give them out.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import const_array, copy_type, fresh_name
from venturi.ir.dtypes import DT
from venturi.ir.quantization import per_tensor
from venturi.ir.region import form_region
from venturi.passes.epilogue import chain_of
from venturi.passes.rewriting import PassContext, drop_dead, producer, replace_value, single_use, sources, substitute

_MOVING = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten"})
_CONTRACTIONS = {"Conv": "conv", "MatMul": "gemm", "Gemm": "gemm"}


def sink(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if not ctx.fuses_quantized or node.graph is not graph or node.domain or not node.inputs:
            continue
        back = producer(node.inputs[0], "DequantizeLinear")
        if back is None or not per_tensor(back) or back.inputs[0].const_value is not None:  # type: ignore[union-attr]
            continue
        undone = node.op_type == "QuantizeLinear" and per_tensor(node) and _same_numbers(back, node)
        if undone and not node.outputs[0].is_graph_output():
            if not ctx.take():
                return
            replace_value(node.outputs[0], back.inputs[0])  # type: ignore[arg-type]
            drop_dead([node, back])
        elif node.op_type in _MOVING and not any(v.uses() for v in node.outputs[1:]):
            if not ctx.take():
                return
            attributes = list(back.attributes.values())
            moved = ir.Node("", node.op_type, [back.inputs[0], *node.inputs[1:]], list(node.attributes.values()))
            after = ir.Node("", "DequantizeLinear", [moved.outputs[0], *back.inputs[1:]], attributes)
            substitute([back, node], [moved, after], [(node.outputs[0], after.outputs[0])])


def _same_numbers(a: ir.Node, b: ir.Node) -> bool:
    def numbers(node: ir.Node) -> list[float]:
        arrays = [const_array(v) for v in node.inputs[1:3]]
        return [float(x.item()) for x in arrays if x is not None]

    small, again = a.inputs[0], b.outputs[0]
    return small is not None and small.dtype == again.dtype and numbers(a) == numbers(b)


def fuse(graph: ir.Graph, ctx: PassContext) -> None:
    if not ctx.fuses_quantized:
        return
    for node in list(graph):
        kind = _CONTRACTIONS.get(node.op_type)
        if kind is None or node.domain or node.graph is not graph or not _quantized(node):
            continue
        if not ctx.take():
            return
        chain = chain_of(node, kind)
        last = single_use(chain[-1].outputs[0])
        if last is not None and last.op_type == "QuantizeLinear" and not last.domain and per_tensor(last):
            chain.append(last)
        form_region("quantized", [*_own_dequantized(graph, chain), *chain])


def _quantized(node: ir.Node) -> bool:
    image, weight = (producer(v, "DequantizeLinear") for v in node.inputs[:2])
    if image is None or weight is None or not per_tensor(image) or image.inputs[0].const_value is not None:  # type: ignore[union-attr]
        return False
    stored = weight.inputs[0]
    return stored is not None and stored.const_value is not None and stored.dtype == DT.INT8


def _own_dequantized(graph: ir.Graph, chain: list[ir.Node]) -> list[ir.Node]:
    """A copy, for the chain alone, of each DequantizeLinear that feeds it."""
    made = []
    for node in chain:
        for i, value in enumerate(node.inputs):
            back = producer(value, "DequantizeLinear")
            if back is None or value is None:
                continue
            copy = ir.Node("", "DequantizeLinear", list(back.inputs), list(back.attributes.values()))
            copy.metadata_props["source"] = sources(back)
            copy.outputs[0].name = fresh_name(value.name or "real")
            copy_type(value, copy.outputs[0])
            graph.insert_before(chain[0], copy)
            node.replace_input_with(i, copy.outputs[0])
            made.append(copy)
            drop_dead([back])
    return made
