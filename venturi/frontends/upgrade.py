"""Brings nodes of opset 1-27 to the fixed opset: one small function per operator whose interface changed.

Semantics follow each operator's ONNX change log. Written natively because the C++ converter serializes weights
(2 GB limit) and lacks several adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from venturi.core.errors import ModelError
from venturi.ir.build import attr, copy_type, get_attr, int64s, make_node, rank, subgraphs
from venturi.ir.build import constant as new_constant
from venturi.ops.table import ML, OPSET, VENTURI, normalize_domain

Upgrade = Callable[[ir.Node, ir.Graph, int], None]
_RULES: dict[tuple[str, str], list[tuple[int, Upgrade]]] = {}


def _before(version: int, *names: str, domain: str = "") -> Callable[[Upgrade], Upgrade]:
    """The decorated function applies to models below `version`."""

    def register(fn: Upgrade) -> Upgrade:
        for name in names:
            _RULES.setdefault((domain, name), []).append((version, fn))
        return fn

    return register


def upgrade_model(model: ir.Model) -> None:
    """Rewrite `model` in place so that every node has the interface of the fixed opset."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OPSET))
    versions = {"": version, ML: model.opset_imports.get(ML, 5)}
    _upgrade_graph(model.graph, versions)
    for function in model.functions.values():
        own = {"": function.opset_imports.get("", version), ML: function.opset_imports.get(ML, versions[ML])}
        _upgrade_nodes(list(function), model.graph, own)
        function.opset_imports[""] = OPSET
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports[""] = OPSET


def _upgrade_graph(graph: ir.Graph, versions: dict[str, int]) -> None:
    _upgrade_nodes(list(graph), graph, versions)


def _upgrade_nodes(nodes: list[ir.Node], graph: ir.Graph, versions: dict[str, int]) -> None:
    for node in nodes:
        domain = normalize_domain(node.domain)
        for below, rule in _RULES.get((domain, node.op_type), []):
            if versions.get(domain, 0) < below:
                rule(node, graph, versions[domain])
        for sub in subgraphs(node):
            _upgrade_graph(sub, versions)


def _pop(node: ir.Node, name: str, default: Any = None) -> Any:
    value = get_attr(node, name, default)
    node.attributes.pop(name, None)
    return value


def _set(node: ir.Node, **values: Any) -> None:
    for name, value in values.items():
        node.attributes[name] = attr(name, value)


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _attr_to_input(node: ir.Node, graph: ir.Graph, name: str, index: int) -> None:
    """Move an integer-list attribute to an int64 input."""
    values = _pop(node, name)
    if values is not None:
        _set_input(node, index, int64s(graph, values, name))


def _replace(node: ir.Node, new: ir.Node) -> None:
    """Put `new` where `node` was, taking over the first output's name and uses."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, new)
    for old, out in zip(node.outputs, new.outputs):
        copy_type(old, out)
        name = old.name
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        old.name, out.name = None, name
    graph.remove(node, safe=True)


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Less", "Greater", "PRelu")


@_before(7, *_ARITHMETIC)
def _legacy_broadcast(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Opset 6: `broadcast=1, axis=k` aligns B's first axis with A's axis k."""
    broadcast, axis = _pop(node, "broadcast", 0), _pop(node, "axis")
    _pop(node, "consumed_inputs")
    a, b = node.inputs[0], node.inputs[1]
    ra, rb = rank(a), rank(b)
    if node.op_type == "PRelu":
        broadcast, axis = rb == 1, 1
    if not broadcast or axis is None:
        return
    if ra is None or rb is None:
        raise ModelError(f"opset {version} broadcast of node {node.name!r} needs known ranks")
    trailing = ra - (axis % ra) - rb
    if trailing > 0:
        new = make_node("Unsqueeze", [b, int64s(graph, list(range(rb, rb + trailing)))])
        node.prepend(new)
        node.replace_input_with(1, new.outputs[0])


@_before(7, "Gemm")
def _gemm_broadcast(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _pop(node, "broadcast")


@_before(
    8,
    "Sum",
    "Max",
    "Min",
    "Mean",
    "Relu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Log",
    "Sqrt",
    "Abs",
    "Neg",
    "Floor",
    "Ceil",
    "Reciprocal",
    "Elu",
    "Selu",
    "LeakyRelu",
    "HardSigmoid",
    "InstanceNormalization",
    "Clip",
    "Cast",
)
def _drop_consumed(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _pop(node, "consumed_inputs")


@_before(6, "Cast")
def _cast_name(node: ir.Node, graph: ir.Graph, version: int) -> None:
    to = _pop(node, "to")
    _set(node, to=int(ir.DataType[to.upper()]) if isinstance(to, str) else to)


@_before(5, "Reshape")
def _reshape_attr(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _pop(node, "consumed_inputs")
    _attr_to_input(node, graph, "shape", 1)


@_before(4, "Concat")
def _concat_axis(node: ir.Node, graph: ir.Graph, version: int) -> None:
    if "axis" not in node.attributes:
        _set(node, axis=1)


@_before(14, "BatchNormalization")
def _batch_norm(node: ir.Node, graph: ir.Graph, version: int) -> None:
    for name in ("consumed_inputs", "is_test", "spatial"):
        _pop(node, name)
    if len(node.outputs) > 1:
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            raise ModelError(f"training outputs of BatchNormalization below opset 14 ({node.name!r}) are not supported")
        node.resize_outputs(1)


@_before(12, "Dropout")
def _dropout(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Below opset 12 inference mode is all there is; ratio has no effect in it."""
    for name in ("ratio", "is_test", "consumed_inputs"):
        _pop(node, name)


@_before(2, "Pad")
def _pad_paddings(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _set(node, pads=_pop(node, "paddings"))


@_before(11, "Pad")
def _pad_inputs(node: ir.Node, graph: ir.Graph, version: int) -> None:
    value = _pop(node, "value", 0.0)
    _attr_to_input(node, graph, "pads", 1)
    if get_attr(node, "mode", "constant") == "constant" and value:
        _set_input(node, 2, new_constant(graph, np.array(value, dtype=_float_of(node)), "pad"))


def _float_of(node: ir.Node) -> Any:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    return dtype.numpy() if dtype is not None else np.float32


@_before(11, "Clip")
def _clip_inputs(node: ir.Node, graph: ir.Graph, version: int) -> None:
    low, high = _pop(node, "min"), _pop(node, "max")
    if low is not None:
        _set_input(node, 1, new_constant(graph, np.array(low, dtype=_float_of(node)), "min"))
    if high is not None:
        _set_input(node, 2, new_constant(graph, np.array(high, dtype=_float_of(node)), "max"))


@_before(10, "Slice")
def _slice_inputs(node: ir.Node, graph: ir.Graph, version: int) -> None:
    starts = get_attr(node, "starts", [])
    axes = _pop(node, "axes") or list(range(len(starts)))
    _attr_to_input(node, graph, "starts", 1)
    _attr_to_input(node, graph, "ends", 2)
    _set_input(node, 3, int64s(graph, axes, "axes"))


@_before(10, "TopK")
def _topk_input(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _set_input(node, 1, int64s(graph, [_pop(node, "k")], "k"))


@_before(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_2d(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Below opset 13 the input is viewed as 2-D at `axis` (default 1) and normalized over the rest."""
    axis, r = _pop(node, "axis", 1), rank(node.inputs[0])
    if axis == -1 or (r is not None and axis in (r - 1, -1)):
        _set(node, axis=-1)
        return
    x, out = node.inputs[0], node.outputs[0]
    shape = make_node("Shape", [x])
    flat = make_node("Flatten", [x], {"axis": axis})
    inner = make_node(node.op_type, [flat.outputs[0]], {"axis": -1}, name=node.name)
    back = make_node("Reshape", [inner.outputs[0], shape.outputs[0]])
    for new in (shape, flat, inner):
        node.prepend(new)
    assert out.name is not None
    _replace(node, back)


@_before(13, "Squeeze", "Unsqueeze", "ReduceSum")
def _axes_input(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _attr_to_input(node, graph, "axes", 1)


@_before(
    18,
    "ReduceMax",
    "ReduceMin",
    "ReduceMean",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
)
def _reduce_axes(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _attr_to_input(node, graph, "axes", 1)


@_before(13, "Split")
def _split_input(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _attr_to_input(node, graph, "split", 1)


@_before(18, "Split")
def _split_count(node: ir.Node, graph: ir.Graph, version: int) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        _set(node, num_outputs=len(node.outputs))


@_before(10, "Upsample", "Resize")
def _upsample(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Upsample 7 has attribute scales, Upsample 9 input scales: both are Resize with asymmetric coordinates."""
    scales = _pop(node, "scales")
    if scales is None and version < 7:
        scales = [1.0, 1.0, _pop(node, "height_scale"), _pop(node, "width_scale")]
    value = new_constant(graph, np.array(scales, dtype=np.float32), "scales") if scales else node.inputs[1]
    _to_resize(node, value)


@_before(11, "Resize", "Upsample")
def _resize_10(node: ir.Node, graph: ir.Graph, version: int) -> None:
    if version == 10:
        _to_resize(node, node.inputs[1])


def _to_resize(node: ir.Node, scales: ir.Value | None) -> None:
    mode = get_attr(node, "mode", "nearest")
    attrs = {
        "mode": "linear" if mode in ("linear", "bilinear") else mode,
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    _replace(node, make_node("Resize", [node.inputs[0], None, scales], attrs, name=node.name))


@_before(11, "Scatter")
def _scatter(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _replace(
        node,
        make_node("ScatterElements", list(node.inputs), {"axis": get_attr(node, "axis", 0)}, name=node.name),
    )


@_before(9, "Scan")
def _scan_8(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Opset 8 scans axis 1 of batched inputs; it lives on as an operator of our own."""
    node.op_type, node.domain = "BatchedScan", VENTURI


@_before(16, "RoiAlign")
def _roi_align(node: ir.Node, graph: ir.Graph, version: int) -> None:
    _set(node, coordinate_transformation_mode="output_half_pixel")


@_before(20, "GridSample")
def _grid_sample(node: ir.Node, graph: ir.Graph, version: int) -> None:
    mode = get_attr(node, "mode", "bilinear")
    _set(node, mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


@_before(20, "DFT")
def _dft_axis(node: ir.Node, graph: ir.Graph, version: int) -> None:
    axis = _pop(node, "axis", 1)
    _set_input(node, 2, int64s(graph, axis, "axis"))


@_before(21, "GroupNormalization")
def _group_norm(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Opset 18 has one scale and bias a group; since 21 it is one a channel."""
    groups = get_attr(node, "num_groups")
    channels = make_node("Shape", [node.inputs[0]], {"start": 1, "end": 2})
    each = make_node("Div", [channels.outputs[0], int64s(graph, [groups])])
    one = int64s(graph, [groups])
    target = make_node("Concat", [one, each.outputs[0]], {"axis": 0})
    for new in (channels, each, target):
        node.prepend(new)
    for index in (1, 2):
        column = make_node("Unsqueeze", [node.inputs[index], int64s(graph, [1])])
        wide = make_node("Expand", [column.outputs[0], target.outputs[0]])
        flat = make_node("Reshape", [wide.outputs[0], int64s(graph, [-1])])
        for new in (column, wide, flat):
            node.prepend(new)
        node.replace_input_with(index, flat.outputs[0])


@_before(2, "LabelEncoder", domain=ML)
def _label_encoder(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """Version 1 maps between classes and their positions; the direction follows the input type."""
    classes = _pop(node, "classes_strings", [])
    fallback_int, fallback_text = _pop(node, "default_int64", -1), _pop(node, "default_string", "_Unused")
    positions = list(range(len(classes)))
    source = node.inputs[0]
    if source is not None and source.dtype == ir.DataType.STRING:
        _set(node, keys_strings=classes, values_int64s=positions, default_int64=fallback_int)
    else:
        _set(node, keys_int64s=positions, values_strings=classes, default_string=fallback_text)
