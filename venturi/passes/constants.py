"""Constant folding by the interpreter, static Shape/Size, and If with a known condition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from venturi.backends.reference.program import node_function
from venturi.core.errors import VenturiError
from venturi.core.log import logger
from venturi.ir.build import constant, copy_type, fresh_name, get_attr, scalar, static_shape, subgraphs
from venturi.ops.table import CONTROL, RANDOM, find_op
from venturi.ops.tensors import to_numpy, to_torch
from venturi.passes.rewriting import PassContext

_KEPT = {"DequantizeLinear", "Constant"}


def run(graph: ir.Graph, ctx: PassContext) -> None:
    """Evaluate pure nodes whose inputs are all constant and whose result stays below the size limit.

    Dequantized weights are left alone: they are how a quantized model says what it is. So is anything that would
    blow a small constant up (Expand, Tile, ConstantOfShape) beyond what it saves.
    """
    for node in list(graph):
        op = find_op(node.domain, node.op_type)
        if op is None or node.op_type in _KEPT or {RANDOM, CONTROL} & op.traits or subgraphs(node):
            continue
        arrays = _static_shape_result(node) or _evaluate(node, ctx.fold_limit_bytes)
        if arrays is None:
            continue
        if not ctx.take():
            return
        _replace_by_constants(graph, node, arrays)


def _static_shape_result(node: ir.Node) -> list[np.ndarray] | None:
    if node.op_type not in ("Shape", "Size") or node.domain or node.inputs[0] is None:
        return None
    value = node.inputs[0]
    if node.op_type == "Size":
        shape = static_shape(value)
        return None if shape is None else [np.array(int(np.prod(shape)), dtype=np.int64)]
    if value.shape is None:
        return None
    dims = list(value.shape)[slice(get_attr(node, "start", 0), get_attr(node, "end"))]
    if not all(isinstance(d, int) for d in dims):
        return None
    return [np.array(dims, dtype=np.int64)]


def _evaluate(node: ir.Node, limit: int) -> list[np.ndarray] | None:
    if not node.inputs or any(v is not None and (v.const_value is None or v.is_graph_input()) for v in node.inputs):
        return None
    inputs = [None if v is None else v.const_value for v in node.inputs]
    total_in = sum(t.nbytes for t in inputs if t is not None and t.dtype != ir.DataType.STRING)
    if total_in > 16 * limit or any(_known_bytes(v) > limit for v in node.outputs):
        return None
    try:
        with torch.inference_mode():
            result = node_function(node)(*(None if t is None else to_torch(t.numpy(), t.dtype) for t in inputs))
    except (VenturiError, RuntimeError, ValueError, IndexError, TypeError, AssertionError) as exc:
        logger.debug("cannot fold %s: %s", node.name, exc)
        return None
    outputs = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(o, torch.Tensor | np.ndarray) for o in outputs[: len(node.outputs)]):
        return None
    arrays = [np.array(to_numpy(o, v.dtype), order="C") for o, v in zip(outputs, node.outputs)]
    size = sum(a.nbytes for a in arrays)
    return None if size > limit or (size > (1 << 16) and size > 2 * total_in) else arrays


def _known_bytes(value: ir.Value) -> float:
    """Size of a value by its inferred type; 0 when unknown."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return 0.0
    return float(np.prod(shape, dtype=np.float64)) * value.dtype.itemsize


def _replace_by_constants(graph: ir.Graph, node: ir.Node, arrays: list[np.ndarray]) -> None:
    for old, array in zip(node.outputs, arrays):
        dtype = old.dtype or ir.DataType.from_numpy(array.dtype)
        if array.dtype == object:
            tensor: ir.TensorProtocol = ir.StringTensor(
                [str(v).encode() for v in array.reshape(-1)], shape=ir.Shape(array.shape)
            )
        else:
            tensor = ir.Tensor(array, dtype=dtype)
        value = constant(graph, tensor, old.name or "folded")
        if old.is_graph_output():
            keep = ir.Node("", "Identity", [value], name=fresh_name("keep"))
            keep.outputs[0].name = fresh_name("keep")
            copy_type(value, keep.outputs[0])
            graph.insert_before(node, keep)
            name = old.name
            ir.convenience.replace_all_uses_with(old, keep.outputs[0], replace_graph_outputs=True)
            old.name, keep.outputs[0].name = None, name
        else:
            ir.convenience.replace_all_uses_with(old, value)
    graph.remove(node, safe=True)


def inline_branches(graph: ir.Graph, ctx: PassContext) -> None:
    """If with a constant condition becomes the nodes of the branch taken."""
    for node in list(graph):
        if node.op_type != "If" or node.domain:
            continue
        condition = scalar(node.inputs[0])
        if condition is None:
            continue
        branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
        if any(v.is_graph_input() or v.producer() is None or v.producer().graph is not branch for v in branch.outputs):  # type: ignore[union-attr]
            continue
        if not ctx.take():
            return
        _splice(graph, node, branch)


def _splice(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    outputs = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        array = value.const_value
        assert array is not None
        ir.convenience.replace_all_uses_with(value, constant(graph, array, value.name or "const"))
    for inner in list(branch):
        branch.remove(inner)
        for out in inner.outputs:
            out.name = fresh_name(out.name or "v")
        inner.name = fresh_name(inner.name or inner.op_type)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, outputs):
        name, is_output = old.name, old.is_graph_output()
        if new.shape is None or old.shape is None:
            copy_type(old if new.shape is None else new, new)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if is_output:
            old.name, new.name = None, name
    graph.remove(node, safe=True)
