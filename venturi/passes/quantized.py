"""Quantized models (Q/DQ): what only moves or compares numbers works on integers, contractions keep both ends.

DequantizeLinear -> MaxPool, Reshape, Transpose or Flatten becomes the operator on integers, dequantized afterwards:
they keep the order of numbers and make none. QuantizeLinear goes in front of a MaxPool of what dequantized operands
make (no NaN is there, whose place in the order integers would lose). A QuantizeLinear that undoes the DequantizeLinear
in front of it goes. A convolution or product of dequantized operands becomes a Region from its DequantizeLinear nodes
to the QuantizeLinear behind it, bias, residual and activation in between; other readers of a dequantized value keep
their own. Devices that can round within also take what follows a QuantizeLinear, up to another one. Where tensor cores
multiply e4m3, contractions of it become such Regions too, up to the first QuantizeLinear.

Only for devices whose kernels take integers in and give them out. Where those must be signed, what a QuantizeLinear
makes for DequantizeLinear nodes alone becomes int8, its zero 128 lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, constant, copy_type, fresh_name, get_attr
from venturi.ir.dtypes import DT
from venturi.ir.quantization import BYTES, FP8, per_tensor
from venturi.ir.region import form_region
from venturi.passes.epilogue import chain_of
from venturi.passes.rewriting import PassContext, drop_dead, producer, replace_value, single_use, sources, substitute

_MOVING = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten"})
_SIGN = 128
_CONTRACTIONS = {"Conv": "conv", "MatMul": "gemm", "Gemm": "gemm"}


def make_signed(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        small = node.outputs[0] if node.op_type == "QuantizeLinear" and not node.domain else None
        if not ctx.signed_bytes or small is None or small.dtype != DT.UINT8 or not per_tensor(node):
            continue
        readers = [u for u, _ in small.uses()]
        same = all(u.op_type == "DequantizeLinear" and per_tensor(u) and _same_numbers(u, node) for u in readers)
        if small.is_graph_output() or not same:
            continue
        if not ctx.take():
            return
        zero = const_array(node.inputs[2]) if len(node.inputs) > 2 else np.uint8(0)
        assert zero is not None
        signed = constant(graph, np.array(int(zero.item()) - _SIGN, np.int8), "zero")
        for user in (node, *readers):
            if len(user.inputs) < 3:
                user.resize_inputs(3)
            user.replace_input_with(2, signed)
        node.attributes.pop("output_dtype", None)
        small.type = ir.TensorType(DT.INT8)


def hoist(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        pool = producer(node.inputs[0], "MaxPool") if node.op_type == "QuantizeLinear" and not node.domain else None
        if not ctx.fuses_quantized or node.graph is not graph or pool is None or not per_tensor(node):
            continue
        if single_use(pool.outputs[0]) is not node or any(v.uses() for v in pool.outputs[1:]):
            continue
        if node.outputs[0].is_graph_output() or not _finite(pool.inputs[0]):
            continue
        if not ctx.take():
            return
        before = ir.Node("", "QuantizeLinear", [pool.inputs[0], *node.inputs[1:]], list(node.attributes.values()))
        after = ir.Node("", "MaxPool", [before.outputs[0]], list(pool.attributes.values()))
        substitute([pool, node], [before, after], [(node.outputs[0], after.outputs[0])])


def _finite(value: ir.Value | None) -> bool:
    """Whether a value is a contraction of dequantized operands and a constant bias, perhaps behind a Relu."""
    relu = producer(value, "Relu")
    made = producer(value if relu is None else relu.inputs[0], *_CONTRACTIONS)
    return made is not None and _quantized(made) and all(map(_constant, made.inputs[2:]))


def _constant(value: ir.Value | None) -> bool:
    back = producer(value, "DequantizeLinear")
    stored = value if back is None else back.inputs[0]
    return stored is None or stored.const_value is not None


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
        if kind is None or node.domain or node.graph is not graph:
            continue
        small = ctx.fuses_fp8 and _quantized(node, (FP8,), FP8)
        if not small and not _quantized(node):
            continue
        if not ctx.take():
            return
        chain = chain_of(node, kind)
        end = _quantizer(chain, (FP8,) if small else BYTES)
        if small and end is not None:
            chain.append(end)
        while end is not None and not small:
            rest = _rest(end, kind) if _goes_on(chain, ctx) else []
            chain.append(end)
            if len(rest) < 2 or sum(n.op_type == "Add" for n in (*chain, *rest)) > 1:
                break
            chain += rest
            end = _quantizer(rest)
        form_region("quantized", [*_own_dequantized(graph, chain), *chain])


def _goes_on(chain: list[ir.Node], ctx: PassContext) -> bool:
    """Whether the device's kernels may round behind `chain` and go on."""
    bare = len(chain) == 1 and get_attr(chain[0], "group", 1) == 1
    return ctx.rounds_within == "anywhere" or (ctx.rounds_within == "sums" and bare)


def _quantizer(chain: list[ir.Node], kinds: Sequence[DT] = BYTES) -> ir.Node | None:
    """The QuantizeLinear behind the chain, to one of `kinds`, those of floating point saturating."""
    last = single_use(chain[-1].outputs[0])
    if last is None or last.op_type != "QuantizeLinear" or last.domain or not per_tensor(last, kinds):
        return None
    return last if get_attr(last, "saturate", 1) else None


def _rest(end: ir.Node, kind: str) -> list[ir.Node]:
    """The DequantizeLinear behind a QuantizeLinear, and what follows it in one kernel.

    Not an Add whose other side is a contraction's own result: that one takes the Add, and rounds less.
    """
    back = single_use(end.outputs[0])
    if back is None or back.op_type != "DequantizeLinear" or not per_tensor(back) or not _same_numbers(back, end):
        return []
    rest = chain_of(back, kind)
    others = [v for n in rest if n.op_type == "Add" for v in n.inputs if v is not None and v.producer() not in rest]
    taken = [v for v in others if producer(v, *_CONTRACTIONS) is not None and single_use(v) is not None]
    return [] if taken else rest


def _quantized(node: ir.Node, kinds: Sequence[DT] = BYTES, weights: DT = DT.INT8) -> bool:
    """Whether the operands are dequantized, the second a constant."""
    image, weight = (producer(v, "DequantizeLinear") for v in node.inputs[:2])
    if image is None or weight is None or not per_tensor(image, kinds) or image.inputs[0].const_value is not None:  # type: ignore[union-attr]
        return False
    stored = weight.inputs[0]
    return stored is not None and stored.const_value is not None and stored.dtype == weights


def _own_dequantized(graph: ir.Graph, chain: list[ir.Node]) -> list[ir.Node]:
    """A copy, for the chain alone, of each DequantizeLinear that feeds it."""
    made = []
    for node in chain:
        for i, value in enumerate(node.inputs):
            back = producer(value, "DequantizeLinear")
            if back is None or value is None or back in chain:
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
