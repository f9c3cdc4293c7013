"""Recognizes activations spelled out in primitives: GELU (erf, tanh), SiLU, quick GELU, HardSwish, Mish."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from venturi.ir.build import get_attr, make_node, scalar
from venturi.passes.rewriting import PassContext, commuted, producer, substitute

Match = tuple[list[ir.Node], ir.Node]


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in list(graph):
        if node.domain or node.op_type not in ("Mul", "Div") or node.graph is not graph:
            continue
        for rule in _RULES:
            found = rule(node)
            if found is None or not _closed(found[0], node):
                continue
            if not ctx.take():
                return
            new = found[1]
            substitute([*found[0], node], [new], [(node.outputs[0], new.outputs[0])])
            break


def _closed(inner: list[ir.Node], root: ir.Node) -> bool:
    """Everything between the input and the root is read inside the pattern only."""
    inside = {*inner, root}
    return all(not v.is_graph_output() and all(u in inside for u, _ in v.uses()) for n in inner for v in n.outputs)


def _near(value: ir.Value | None, want: float, rel: float = 1e-3) -> bool:
    got = scalar(value)
    return got is not None and math.isclose(got, want, rel_tol=rel)


def _factors(node: ir.Node) -> list[tuple[ir.Value, float, list[ir.Node]]]:
    """Ways to see a Mul/Div by a constant as (value, factor)."""
    out: list[tuple[ir.Value, float, list[ir.Node]]] = []
    if node.op_type == "Mul":
        for value, other in commuted(node):
            c = scalar(other)
            if c is not None:
                out.append((value, c, [node]))
    elif node.op_type == "Div" and node.inputs[0] is not None:
        c = scalar(node.inputs[1])
        if c:
            out.append((node.inputs[0], 1.0 / c, [node]))
    return out


def _product(node: ir.Node) -> list[tuple[list[ir.Value], float, list[ir.Node]]]:
    """A product tree of two non-constant values and constants: (values, constant factor, inner nodes)."""
    results: list[tuple[list[ir.Value], float, list[ir.Node]]] = []
    for value, c, _ in _factors(node):
        inner = producer(value, "Mul")
        if inner is not None and all(scalar(v) is None for v in inner.inputs):
            results.append(([v for v in inner.inputs if v is not None], c, [inner]))
    if node.op_type == "Mul":
        for a, b in commuted(node):
            results.append(([a, b], 1.0, []))
            scaled = producer(a, "Mul", "Div")
            if scaled is not None:
                for value, c, nodes in _factors(scaled):
                    results.append(([value, b], c, nodes))
                    results.append(([b, value], c, nodes))
    return results


def _one_plus(value: ir.Value, *inner: str) -> tuple[ir.Node, ir.Node] | None:
    """value = 1 + f(...): the Add and the producer of f."""
    add = producer(value, "Add")
    if add is None:
        return None
    for a, b in commuted(add):
        if _near(b, 1.0):
            f = producer(a, *inner)
            if f is not None:
                return add, f
    return None


def _gelu(node: ir.Node) -> Match | None:
    """x * 0.5 * (1 + erf(x / sqrt 2)) or x * 0.5 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in any order."""
    for (a, b), c, inner in _product(node):
        if not math.isclose(c, 0.5, rel_tol=1e-3):
            continue
        for x, gate in ((a, b), (b, a)):
            found = _one_plus(gate, "Erf", "Tanh")
            if found is None:
                continue
            add, f = found
            argument = _erf_argument(f, x) if f.op_type == "Erf" else _tanh_argument(f, x)
            if argument is not None:
                mode = "none" if f.op_type == "Erf" else "tanh"
                return [*argument, f, add, *inner], make_node("Gelu", [x], {"approximate": mode})
    return None


def _erf_argument(f: ir.Node, x: ir.Value) -> list[ir.Node] | None:
    scaled = producer(f.inputs[0], "Mul", "Div")
    if scaled is None:
        return None
    for value, c, _ in _factors(scaled):
        if value is x and math.isclose(c, math.sqrt(0.5), rel_tol=1e-3):
            return [scaled]
    return None


def _tanh_argument(f: ir.Node, x: ir.Value) -> list[ir.Node] | None:
    scaled = producer(f.inputs[0], "Mul")
    if scaled is None:
        return None
    for value, c, _ in _factors(scaled):
        add = producer(value, "Add")
        if add is None or not math.isclose(c, math.sqrt(2 / math.pi), rel_tol=1e-3):
            continue
        for a, b in commuted(add):
            cubic = producer(b, "Mul")
            if a is not x or cubic is None:
                continue
            for cube, k, _ in _factors(cubic):
                nodes = _cube(cube, x)
                if nodes is not None and math.isclose(k, 0.044715, rel_tol=1e-3):
                    return [*nodes, cubic, add, scaled]
    return None


def _cube(value: ir.Value, x: ir.Value) -> list[ir.Node] | None:
    power = producer(value, "Pow")
    if power is not None and power.inputs[0] is x and _near(power.inputs[1], 3.0):
        return [power]
    outer = producer(value, "Mul")
    if outer is not None:
        for a, b in commuted(outer):
            square = producer(a, "Mul")
            if b is x and square is not None and square.inputs[0] is x and square.inputs[1] is x:
                return [square, outer]
    return None


def _silu(node: ir.Node) -> Match | None:
    """x * sigmoid(x) and x * sigmoid(a x)."""
    if node.op_type != "Mul":
        return None
    for x, gate in commuted(node):
        sigmoid = producer(gate, "Sigmoid")
        if sigmoid is None:
            continue
        if sigmoid.inputs[0] is x:
            return [sigmoid], make_node("Swish", [x], {"alpha": 1.0})
        scaled = producer(sigmoid.inputs[0], "Mul")
        for value, c, _ in _factors(scaled) if scaled else []:
            if value is x and scaled is not None:
                return [scaled, sigmoid], make_node("Swish", [x], {"alpha": c})
    return None


def _hard_swish(node: ir.Node) -> Match | None:
    """x * hardsigmoid(x; 1/6, 1/2), or x * clip(x + 3, 0, 6) / 6 in any order."""
    if node.op_type == "Mul":
        for x, gate in commuted(node):
            hard = producer(gate, "HardSigmoid")
            if hard is not None and hard.inputs[0] is x:
                alpha, beta = get_attr(hard, "alpha", 0.2), get_attr(hard, "beta", 0.5)
                if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and math.isclose(beta, 0.5, rel_tol=1e-4):
                    return [hard], make_node("HardSwish", [x])
    candidates = _product(node)
    for value, c, _ in _factors(node):
        inner = producer(value, "Mul")
        if inner is not None and all(v is not None for v in inner.inputs):
            candidates.append(([v for v in inner.inputs if v is not None], c, [inner]))
    for (a, b), c, inner_nodes in candidates:
        if not math.isclose(c, 1 / 6, rel_tol=1e-4):
            continue
        for x, gate in ((a, b), (b, a)):
            clip = producer(gate, "Clip")
            add = producer(clip.inputs[0], "Add") if clip is not None else None
            if clip is None or add is None or len(clip.inputs) < 3:
                continue
            low, high = scalar(clip.inputs[1]), scalar(clip.inputs[2])
            if low == 0.0 and high == 6.0 and any(p is x and scalar(q) == 3.0 for p, q in commuted(add)):
                return [add, clip, *inner_nodes], make_node("HardSwish", [x])
    return None


def _mish(node: ir.Node) -> Match | None:
    """x * tanh(softplus(x))."""
    if node.op_type != "Mul":
        return None
    for x, gate in commuted(node):
        tanh = producer(gate, "Tanh")
        soft = producer(tanh.inputs[0], "Softplus") if tanh is not None else None
        if tanh is not None and soft is not None and soft.inputs[0] is x:
            return [soft, tanh], make_node("Mish", [x])
    return None


_RULES: tuple[Callable[[ir.Node], Match | None], ...] = (_gelu, _hard_swish, _mish, _silu)
