"""Searches for a culprit: the smallest failing part of a model, the guilty rewrite, the layers that need precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from venturi.backends.reference.interpreter import Interpreter
from venturi.engine.surgery import extract
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext

Fails = Callable[[ir.Model], bool]


def reduce_model(model: ir.Model, fails: Fails) -> ir.Model:
    """The smallest part of `model` that still fails: outputs are moved forward by bisection, then inputs backward.

    `fails` must be true for `model` itself. The result is minimal for a failure caused by one node.
    """
    nodes = list(model.graph)
    names = [n.outputs[0].name or "" for n in nodes]
    low, high = 0, len(names) - 1
    best = model
    while low < high:
        middle = (low + high) // 2
        part = extract(model, [], [names[middle]])
        if fails(part):
            best, high = part, middle
        else:
            low = middle + 1
    return _raise_inputs(_earliest(best, fails), fails)


def _earliest(model: ir.Model, fails: Fails, at_most: int = 64) -> ir.Model:
    """Bisection by position assumes that failing only ever starts; in a branched graph the first failing node may lie
    before it. Tried one by one when few nodes are left."""
    nodes = list(model.graph)
    for node in nodes if len(nodes) <= at_most else []:
        part = extract(model, [], [node.outputs[0].name or ""])
        if fails(part):
            return part
    return model


def _raise_inputs(model: ir.Model, fails: Fails) -> ir.Model:
    """Cut the graph above its last nodes: the fewest nodes that still fail when their inputs become graph inputs."""
    nodes = list(model.graph)
    outputs = [v.name or "" for v in model.graph.outputs]
    low, high, best = 1, len(nodes), model
    while low < high:
        keep = (low + high) // 2
        tail = nodes[len(nodes) - keep :]
        inside = {v for n in tail for v in n.outputs}
        cut = {
            v.name: None
            for n in tail
            for v in n.inputs
            if v is not None and v not in inside and v.const_value is None and v.name
        }
        part = extract(model, [c for c in cut if c], outputs)
        if fails(part):
            best, high = part, keep
        else:
            low = keep + 1
    return best


@dataclass(frozen=True)
class Guilty:
    """The first rewrite that makes the result wrong: its number, and the pass that did it."""

    rewrite: int
    name: str
    total: int


def bisect_passes(model: ir.Model, wrong: Fails, precision: str = "model") -> Guilty | None:
    """Find the rewrite after which `wrong` holds, by fuel. None when the fully optimized model is fine."""

    def optimized(fuel: int) -> tuple[ir.Model, PassContext]:
        copy, ctx = model.clone(), PassContext(fuel=fuel, precision=precision)
        run_pipeline(copy, ctx)
        return copy, ctx

    final, ctx = optimized(-1)
    total = sum(ctx.rewrites.values())
    if not wrong(final):
        return None
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        if wrong(optimized(middle)[0]):
            high = middle
        else:
            low = middle + 1
    before, after = optimized(max(low - 1, 0))[1].rewrites, optimized(low)[1].rewrites
    name = next((k for k in after if after[k] != before.get(k, 0)), "import")
    return Guilty(low, name, total)


def differs(inputs: Mapping[str, Any], reference: Mapping[str, Any], rtol: float, atol: float) -> Fails:
    """A check that runs a model by the interpreter and compares with known outputs; an error counts as wrong."""

    def check(model: ir.Model) -> bool:
        from venturi.core.errors import VenturiError

        try:
            got = Interpreter(model.graph).run(inputs)
        except VenturiError:
            return True
        return any(
            isinstance(want, np.ndarray)
            and not np.allclose(
                np.asarray(got[n], np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
            )
            for n, want in reference.items()
        )

    return check


@dataclass(frozen=True)
class Sensitivity:
    """How far a step's output moves when it alone computes in the low precision: max |d| over max |x|."""

    step: str
    op: str
    error: float


def precision_sensitivity(model: ir.Model, inputs: Mapping[str, Any], precision: str) -> list[Sensitivity]:
    """Every contraction's own error in `precision`, largest first: on fp32 inputs, inputs and weights rounded once."""
    import torch

    from venturi.backends.reference.program import node_function
    from venturi.ir.dtypes import precision_dtype
    from venturi.ops.tensors import STORAGE
    from venturi.passes.cast_precision import NARROW

    low = STORAGE[precision_dtype(precision)]
    found: list[Sensitivity] = []

    def hook(node: ir.Node, args: list[Any], outputs: tuple[Any, ...]) -> None:
        if node.op_type not in NARROW or node.domain or not isinstance(outputs[0], torch.Tensor):
            return
        narrow = [a.to(low).float() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
        got = node_function(node)(*narrow)
        first = got[0] if isinstance(got, tuple) else got
        scale = float(outputs[0].abs().max()) if outputs[0].numel() else 0.0
        error = float((first - outputs[0]).abs().max()) / scale if scale else 0.0
        found.append(Sensitivity(node.name or "", node.op_type, error))

    Interpreter(model.graph).run(inputs, hook)
    return sorted(found, key=lambda s: -s.error)
