"""Recognizes LayerNorm, RMSNorm and GroupNorm spelled out in primitives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, constant, dim, get_attr, ints, make_node, rank, scalar, static_shape
from venturi.passes.rewriting import PassContext, commuted, producer, single_use, substitute


@dataclass(frozen=True)
class Normalized:
    """A matched normalization before scale and bias: `root` yields x normalized over the last axis."""

    kind: str
    x: ir.Value
    epsilon: float
    inner: tuple[ir.Node, ...]
    root: ir.Node


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.domain or node.graph is not graph:
            continue
        if node.op_type in ("Div", "Mul"):
            found = _match(node)
            if found is not None and _closed(found) and not _rewrite(graph, found, ctx):
                return
        elif node.op_type == "InstanceNormalization" and not _group_norm(graph, node, ctx):
            return


def _closed(found: Normalized) -> bool:
    inside = {*found.inner, found.root}
    return all(
        not v.is_graph_output() and all(u in inside for u, _ in v.uses()) for n in found.inner for v in n.outputs
    )


def _match(node: ir.Node) -> Normalized | None:
    """node = numerator / sqrt(mean(square) + eps), in one of three spellings."""
    for numerator, root, extra in _over_root(node):
        add = producer(root.inputs[0], "Add")
        if add is None:
            continue
        for mean_value, eps_value in commuted(add):
            epsilon, mean = scalar(eps_value), producer(mean_value, "ReduceMean")
            if epsilon is None or mean is None or not _last_axis(mean):
                continue
            square = _square_of(mean.inputs[0], numerator)
            if square is None:
                continue
            inner = (square, mean, add, root, *extra)
            return _layer_norm(numerator, epsilon, inner, node) or Normalized("rms", numerator, epsilon, inner, node)
    return None


def _over_root(node: ir.Node) -> list[tuple[ir.Value, ir.Node, tuple[ir.Node, ...]]]:
    """(numerator, Sqrt-or-Pow node, extra nodes) for a/sqrt(b), a*(1/sqrt(b)) and a*b^-0.5."""
    out: list[tuple[ir.Value, ir.Node, tuple[ir.Node, ...]]] = []
    if node.op_type == "Div" and node.inputs[0] is not None:
        root = producer(node.inputs[1], "Sqrt")
        if root is not None:
            out.append((node.inputs[0], root, ()))
        return out
    for a, b in commuted(node):
        inverse = producer(b, "Reciprocal")
        one_over = producer(b, "Div")
        if one_over is not None and scalar(one_over.inputs[0]) == 1.0:
            root = producer(one_over.inputs[1], "Sqrt")
            if root is not None:
                out.append((a, root, (one_over,)))
        root = producer(inverse.inputs[0], "Sqrt") if inverse is not None else None
        if root is not None and inverse is not None:
            out.append((a, root, (inverse,)))
        power = producer(b, "Pow")
        if power is not None and scalar(power.inputs[1]) == -0.5:
            out.append((a, power, ()))
    return out


def _last_axis(mean: ir.Node) -> bool:
    r = rank(mean.inputs[0])
    axes = ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return (
        bool(get_attr(mean, "keepdims", 1)) and axes is not None and r is not None and [a % r for a in axes] == [r - 1]
    )


def _square_of(value: ir.Value | None, x: ir.Value) -> ir.Node | None:
    power = producer(value, "Pow")
    if power is not None and power.inputs[0] is x and scalar(power.inputs[1]) == 2.0:
        return power
    product = producer(value, "Mul")
    return product if product is not None and product.inputs[0] is x and product.inputs[1] is x else None


def _layer_norm(centred: ir.Value, epsilon: float, inner: tuple[ir.Node, ...], root: ir.Node) -> Normalized | None:
    sub = producer(centred, "Sub")
    mean = producer(sub.inputs[1], "ReduceMean") if sub is not None else None
    if (
        sub is None
        or mean is None
        or sub.inputs[0] is None
        or mean.inputs[0] is not sub.inputs[0]
        or not _last_axis(mean)
    ):
        return None
    return Normalized("layer", sub.inputs[0], epsilon, (mean, sub, *inner), root)


def _vector(value: ir.Value, size: int | None) -> bool:
    """A 1-D value as long as the last axis."""
    return size is not None and static_shape(value) == [size]


def _rewrite(graph: ir.Graph, found: Normalized, ctx: PassContext) -> bool:
    """Replace the pattern with its scale and bias; False when fuel ran out."""
    size = dim(found.x, -1)
    dtype = found.x.dtype
    if size is None or dtype is None or found.root.outputs[0].dtype != dtype:
        return True
    last, scale, bias = found.root, None, None
    user = single_use(last.outputs[0])
    if user is not None and user.op_type == "Mul" and not user.domain:
        scale = next(
            (b for a, b in commuted(user) if a is last.outputs[0] and _vector(b, size) and b.dtype == dtype),
            None,
        )
        last = user if scale is not None else last
    user = single_use(last.outputs[0])
    if found.kind == "layer" and scale is not None and user is not None and user.op_type == "Add" and not user.domain:
        bias = next(
            (b for a, b in commuted(user) if a is last.outputs[0] and _vector(b, size) and b.dtype == dtype),
            None,
        )
        last = user if bias is not None else last
    if not ctx.take():
        return False
    matched = [*found.inner, found.root]
    for node in (scale_node(found.root, last), last):
        if node is not None and node not in matched:
            matched.append(node)
    if scale is None:
        scale = constant(graph, np.ones(size, dtype=dtype.numpy()), "ones")
    op_type = "LayerNormalization" if found.kind == "layer" else "RMSNormalization"
    inputs = [found.x, scale, *([bias] if bias is not None else [])]
    new = make_node(op_type, inputs, {"axis": -1, "epsilon": found.epsilon}, name=found.root.name)
    substitute(matched, [new], [(last.outputs[0], new.outputs[0])])
    return True


def scale_node(root: ir.Node, last: ir.Node) -> ir.Node | None:
    """The Mul between the root and the final Add, when there is one."""
    if last is root:
        return None
    user = single_use(root.outputs[0])
    return user if user is not last else None


def _group_norm(graph: ir.Graph, node: ir.Node, ctx: PassContext) -> bool:
    """Reshape [N, G, -1] → InstanceNorm (ones, zeros) → Reshape back → Mul [C,1..] → Add [C,1..]."""
    before, after = producer(node.inputs[0], "Reshape"), single_use(node.outputs[0])
    if before is None or after is None or after.op_type != "Reshape" or single_use(before.outputs[0]) is not node:
        return True
    x = before.inputs[0]
    scale, bias = const_array(node.inputs[1], 65536), const_array(node.inputs[2], 65536)
    groups, channels = dim(before.outputs[0], 1), dim(x, 1)
    if x is None or x.shape is None or groups is None or channels is None or scale is None or bias is None:
        return True
    if rank(before.outputs[0]) != 3 or not (scale == 1).all() or (bias != 0).any():
        return True
    if after.outputs[0].shape is None or list(after.outputs[0].shape) != list(x.shape):
        return True
    matched, last = [before, node, after], after
    vectors = []
    for op_type in ("Mul", "Add"):
        user = single_use(last.outputs[0])
        other = None
        if user is not None and user.op_type == op_type and not user.domain:
            other = next((b for a, b in commuted(user) if a is last.outputs[0]), None)
        array = const_array(other, 65536)
        if user is None or array is None or array.size != channels or dim(other, -len(list(x.shape)) + 1) != channels:
            return True
        vectors.append(constant(graph, array.reshape(-1), op_type.lower()))
        matched.append(user)
        last = user
    if not ctx.take():
        return False
    attrs = {"num_groups": groups, "epsilon": get_attr(node, "epsilon", 1e-5)}
    new = make_node("GroupNormalization", [x, *vectors], attrs, name=node.name)
    substitute(matched, [new], [(last.outputs[0], new.outputs[0])])
    return True
