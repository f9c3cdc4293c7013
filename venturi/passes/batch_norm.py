"""Folds BatchNormalization into neighbouring convolutions and products, else into one multiply and add."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, constant, get_attr, make_node, rank
from venturi.passes.rewriting import PassContext, producer, single_use, substitute

Array = np.ndarray


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.op_type != "BatchNormalization" or node.domain or node.graph is not graph:
            continue
        affine = _affine(node)
        if affine is None or node.inputs[0] is None:
            continue
        if not ctx.take():
            return
        if not (_into_producer(graph, node, *affine) or _into_consumer(graph, node, *affine)):
            _as_pointwise(graph, node, *affine)


def _affine(node: ir.Node) -> tuple[Array, Array] | None:
    """Inference batch norm is y = x*factor + shift per channel, computed in fp64."""
    if get_attr(node, "training_mode", 0) or rank(node.inputs[0]) is None:
        return None
    arrays = [const_array(v) for v in node.inputs[1:5]]
    if any(a is None for a in arrays):
        return None
    scale, bias, mean, var = (np.asarray(a, dtype=np.float64) for a in arrays)
    factor = scale / np.sqrt(var + get_attr(node, "epsilon", 1e-5))
    return factor, bias - mean * factor


def _into_producer(graph: ir.Graph, node: ir.Node, factor: Array, shift: Array) -> bool:
    first = producer(node.inputs[0], "Conv", "ConvTranspose", "Gemm", "MatMul")
    if first is None or single_use(first.outputs[0]) is not node or rank(node.inputs[0]) == 1:
        return False
    if first.op_type in ("Gemm", "MatMul") and rank(node.inputs[0]) != 2:
        return False
    return scale_outputs(graph, first, node, factor, shift)


def scale_outputs(graph: ir.Graph, first: ir.Node, last: ir.Node, factor: Array, shift: Array) -> bool:
    """Rewrite `first` (conv or product with constant weights) so that it yields y*factor + shift per channel."""
    weight = const_array(first.inputs[1])
    bias_value = first.inputs[2] if len(first.inputs) > 2 else None
    bias = const_array(bias_value)
    if (
        weight is None
        or (bias_value is not None and bias is None)
        or weight.dtype not in (np.float32, np.float64, np.float16)
    ):
        return False
    kind, alpha, beta = first.op_type, get_attr(first, "alpha", 1.0), get_attr(first, "beta", 1.0)
    channels = factor.size
    if kind == "Conv":
        wide = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    elif kind == "ConvTranspose":
        group = get_attr(first, "group", 1)
        per_group = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        shaped = factor.reshape(group, 1, channels // group, *[1] * (weight.ndim - 2))
        wide = (per_group * shaped).reshape(weight.shape)
    elif kind == "Gemm" and get_attr(first, "transB", 0):
        wide = weight * factor[:, None]
    else:
        if weight.ndim != 2:
            return False
        wide = weight * factor
    old = 0.0 if bias is None else bias.astype(np.float64) * (beta if kind == "Gemm" else 1.0)
    if isinstance(old, np.ndarray) and old.size not in (1, channels):
        return False
    new_bias = (
        np.broadcast_to(np.reshape(old, -1) if isinstance(old, np.ndarray) else old, (channels,)) * factor + shift
    )
    attrs = {k: get_attr(first, k) for k in first.attributes}
    op_type = kind
    if kind == "MatMul":
        op_type = "Gemm"
        if rank(first.inputs[0]) != 2:
            return False
    elif kind == "Gemm":
        attrs["beta"] = 1.0
        attrs["alpha"] = alpha
    dtype = weight.dtype
    inputs = [
        first.inputs[0],
        constant(graph, wide.astype(dtype), "weight"),
        constant(graph, new_bias.astype(dtype), "bias"),
    ]
    new = make_node(op_type, inputs, attrs, name=first.name)
    substitute([first, last], [new], [(last.outputs[0], new.outputs[0])])
    return True


def _into_consumer(graph: ir.Graph, node: ir.Node, factor: Array, shift: Array) -> bool:
    """Batch norm before a convolution without padding: scale the weights' input channels, add to the bias."""
    conv = single_use(node.outputs[0])
    if (
        conv is None
        or conv.op_type != "Conv"
        or conv.inputs[0] is not node.outputs[0]
        or get_attr(conv, "group", 1) != 1
    ):
        return False
    if any(get_attr(conv, "pads") or []) or get_attr(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    weight = const_array(conv.inputs[1])
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = const_array(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        return False
    spatial = [1] * (weight.ndim - 2)
    wide = weight * factor.reshape(1, -1, *spatial)
    added = (weight.astype(np.float64) * shift.reshape(1, -1, *spatial)).reshape(weight.shape[0], -1).sum(1)
    new_bias = (0 if bias is None else bias) + added
    new = make_node(
        "Conv",
        [
            node.inputs[0],
            constant(graph, wide.astype(weight.dtype), "weight"),
            constant(graph, new_bias.astype(weight.dtype), "bias"),
        ],
        {k: get_attr(conv, k) for k in conv.attributes},
        name=conv.name,
    )
    substitute([node, conv], [new], [(conv.outputs[0], new.outputs[0])])
    return True


def _as_pointwise(graph: ir.Graph, node: ir.Node, factor: Array, shift: Array) -> None:
    x, dtype = node.inputs[0], node.inputs[0].dtype if node.inputs[0] else None
    assert x is not None
    assert dtype is not None
    shape = [-1, *[1] * ((rank(x) or 2) - 2)]
    kind = dtype.numpy()
    mul = make_node("Mul", [x, constant(graph, factor.reshape(shape).astype(kind), "scale")])
    mul.outputs[0].type, mul.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    add = make_node(
        "Add", [mul.outputs[0], constant(graph, shift.reshape(shape).astype(kind), "shift")], name=node.name
    )
    substitute([node], [mul, add], [(node.outputs[0], add.outputs[0])])
