"""Folds per-channel constant Mul and Add after a convolution into its weights and bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, constant, dim, get_attr, make_node, rank
from venturi.passes.batch_norm import scale_outputs
from venturi.passes.rewriting import PassContext, commuted, producer, single_use, substitute


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.domain or node.op_type not in ("Mul", "Add") or node.graph is not graph:
            continue
        for value, other in commuted(node):
            conv = producer(value, "Conv", "ConvTranspose")
            if conv is None or single_use(conv.outputs[0]) is not node:
                continue
            vector = _per_channel(other, conv.outputs[0])
            if vector is None or const_array(conv.inputs[1]) is None:
                continue
            if not ctx.take():
                return
            if node.op_type == "Mul":
                scale_outputs(graph, conv, node, vector, np.zeros_like(vector))
            else:
                _add_bias(graph, conv, node, vector)
            break


def _per_channel(value: ir.Value, target: ir.Value) -> np.ndarray | None:
    """A constant [C, 1, ...] (or one number) that broadcasts over the channels of `target` and changes no shape."""
    array, r, channels = const_array(value, 65536), rank(target), dim(target, 1)
    if array is None or r is None or channels is None or array.dtype.kind != "f" or array.ndim > r:
        return None
    shape = [1] * (r - array.ndim) + list(array.shape)
    if any(d != 1 for i, d in enumerate(shape) if i != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float64)


def _add_bias(graph: ir.Graph, conv: ir.Node, node: ir.Node, vector: np.ndarray) -> None:
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias, weight = const_array(bias_value), const_array(conv.inputs[1])
    if weight is None or (bias_value is not None and bias is None):
        return
    total = vector if bias is None else vector + bias
    inputs = [conv.inputs[0], conv.inputs[1], constant(graph, total.astype(weight.dtype), "bias")]
    new = make_node(conv.op_type, inputs, {k: get_attr(conv, k) for k in conv.attributes}, name=conv.name)
    substitute([conv, node], [new], [(node.outputs[0], new.outputs[0])])
