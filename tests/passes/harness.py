"""Optimizes a small network, counts what came out, and checks that the meaning stayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import venturi as vt
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx
from venturi.ir.region import is_region, kind_of, members
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext

Build = Callable[[vt.Network], None]


def rand(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def optimize(net: vt.Network, precision: str = "model") -> ir.Model:
    model = import_onnx(net.to_model())
    run_pipeline(model, PassContext(precision=precision))
    return model


def ops(model: ir.Model) -> Counter[str]:
    """Operators after optimization, those inside Regions included."""
    return Counter(m.op_type for n in model.graph for m in members(n))


def regions(model: ir.Model) -> list[str]:
    """kind:op+op of every Region, in order."""
    return [f"{kind_of(n)}:{'+'.join(m.op_type for m in members(n))}" for n in model.graph if is_region(n)]


def check(net: vt.Network, model: ir.Model, rtol: float = 1e-5, **given: Any) -> None:
    """The optimized model computes what the imported one does, on random inputs (free dimensions are 3)."""
    source = import_onnx(net.to_model())
    rng = np.random.default_rng(1)
    inputs = dict(given)
    for value in source.graph.inputs:
        shape = [d if isinstance(d, int) else 3 for d in value.shape or ()]
        kind = value.dtype.numpy() if value.dtype else np.float32
        if value.name not in inputs:
            data = rng.standard_normal(shape) if np.dtype(kind).kind not in "iub" else rng.integers(0, 2, shape)
            inputs[value.name or ""] = data.astype(kind)
    want, got = Interpreter(source.graph).run(inputs), Interpreter(model.graph).run(inputs)
    assert list(want) == list(got)
    for name, w in want.items():
        assert got[name].dtype == w.dtype
        assert got[name].shape == w.shape
        scale = np.abs(w[np.isfinite(w)]).max(initial=1e-6) if w.dtype.kind == "f" else 1
        np.testing.assert_allclose(got[name], w, rtol=rtol, atol=rtol * scale)


def net_of(build: Build) -> vt.Network:
    net = vt.Network("case")
    build(net)
    return net


def image(net: vt.Network, channels: int = 4, batch: Any = "n") -> Any:
    return net.input("x", (batch, channels, 8, 8))


def gemm_bias_gelu(net: vt.Network) -> None:
    net.output("y", net.gelu(net.input("x", ("n", 3, 8)) @ rand(8, 5) + rand(5)))


def case(name: str, build: Build, expect: dict[str, int], **kw: Any) -> Any:
    """`expect`: operator → how often it is left."""
    return pytest.param(build, expect, kw, id=name)


def bn_args(c: int) -> list[Any]:
    return [rand(c, seed=1) + 2, rand(c, seed=2), rand(c, seed=3), rand(c, seed=4, low=0.5, high=2)]


def check_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    """What a `case` promises: the operators that are left, and the meaning."""
    net = net_of(build)
    model = optimize(net)
    found = ops(model)
    assert {k: found[k] for k in expect} == expect
    if options.get("meaning", True):
        check(net, model, rtol=2e-5)
