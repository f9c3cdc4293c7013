"""Pointwise and reduction clusters on ATen: the body with temporaries reused in place, and single operators
that write straight into the arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Arguments, Config, Kernel, RegionView
from venturi.backends.reference.program import node_function
from venturi.ir.dtypes import FLOATS
from venturi.ir.region import is_region

T = torch.Tensor
_BINARY: dict[str, Callable[..., T]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
}
_UNARY: dict[str, Callable[..., T]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Erf": torch.erf,
    "Sqrt": torch.sqrt,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Reciprocal": torch.reciprocal,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
}


def _relu_out(x: T, out: T) -> T:
    return torch.clamp_min(x, 0, out=out)


def _out_function(node: ir.Node) -> Callable[..., T] | None:
    """A torch function with `out=` that means the same as the node, floats only."""
    if node.domain or any(v is None or v.dtype not in FLOATS for v in node.inputs):
        return None
    if len({v.dtype for v in node.inputs if v is not None}) != 1:
        return None
    if node.op_type == "Relu":
        return _relu_out
    return _BINARY.get(node.op_type) or _UNARY.get(node.op_type)


class InPlaceBody:
    """The Region's nodes one after the other; a result overwrites an operand that is a dead temporary of its shape."""

    name = "aten-inplace"

    def match(self, region: RegionView) -> list[Config] | str:
        if not is_region(region.node) or region.kind not in ("pointwise", "reduce"):
            return "not a pointwise or reduction cluster"
        if not any(_out_function(n) for n in region.nodes[1:]):
            return "no node of the body can write in place"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        slots: dict[ir.Value, int] = {v: i for i, v in enumerate(region.formal) if v is not None}
        last: dict[ir.Value, int] = {}
        for i, node in enumerate(region.nodes):
            for v in node.inputs:
                if v is not None:
                    last[v] = i
        made: set[ir.Value] = set()
        steps = []
        for i, node in enumerate(region.nodes):
            reads = [-1 if v is None else slots[v] for v in node.inputs]
            victims = [slots[v] for v in node.inputs if v in made and last[v] == i] if _out_function(node) else []
            slots[node.outputs[0]] = len(slots)
            if _out_function(node):
                made.add(node.outputs[0])
            steps.append(
                (
                    node_function(node),
                    _out_function(node),
                    tuple(reads),
                    tuple(victims),
                    slots[node.outputs[0]],
                )
            )
        size, result, fill = len(slots), slots[region.outputs[0]], Arguments(region)

        def run(*args: Any) -> T:
            env: list[Any] = [None] * (size + 1)
            env[: len(region.formal)] = fill(args)
            for fn, out_fn, reads, victims, target in steps:
                inputs = [env[r] for r in reads]
                home = _home(inputs, [env[v] for v in victims]) if victims and out_fn else None
                env[target] = fn(*inputs) if home is None or out_fn is None else out_fn(*inputs, out=home)
            return env[result]  # type: ignore[no-any-return]

        return Kernel(run)


def _home(inputs: list[Any], victims: list[Any]) -> T | None:
    """A dead temporary of the result's shape. Victims come from out-capable nodes, so they own their memory."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    for v in victims:
        if v.shape == shape:
            return v  # type: ignore[no-any-return]
    return None


class OutPointwise:
    """A single pointwise operator that can write its result into the arena."""

    name = "aten-out"

    def match(self, region: RegionView) -> list[Config] | str:
        if is_region(region.node) or _out_function(region.node) is None:
            return "not a single floating-point operator with an out variant"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        fn = _out_function(region.node)
        reference = node_function(region.node)
        assert fn is not None
        fill = Arguments(region)
        if all(c is None for c in fill.constants):
            return Kernel(reference, lambda *args, out: fn(*args, out=out))

        def run_out(*args: Any, out: T) -> None:
            fn(*fill(args), out=out)

        return Kernel(lambda *args: reference(*fill(args)), run_out)
