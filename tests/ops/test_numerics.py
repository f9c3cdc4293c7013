"""Operator references and CPU kernels on fresh random inputs: against numpy in fp64, and every tactic against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import venturi as vt
from venturi.backends.base import RegionView, disagreement, region_ulps, tolerance
from venturi.backends.cpu.backend import CPU
from venturi.backends.reference.program import node_function
from venturi.engine.builder import stored_weights
from venturi.frontends.onnx_import import import_onnx
from venturi.ir.build import make_node
from venturi.ops.table import OPS, load_all
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext

load_all()
_erf = np.vectorize(math.erf)
UNARY: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "Abs": (np.abs, -5, 5), "Ceil": (np.ceil, -5, 5), "Cos": (np.cos, -5, 5), "Exp": (np.exp, -5, 5), "Floor": (np.floor, -5, 5),
    "Log": (np.log, 0.01, 9), "Neg": (np.negative, -5, 5), "Reciprocal": (np.reciprocal, 0.1, 5), "Round": (np.round, -5, 5),
    "Sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -5, 5), "Sign": (np.sign, -5, 5), "Sin": (np.sin, -5, 5), "Sqrt": (np.sqrt, 0, 9),
    "Tan": (np.tan, -1, 1), "Tanh": (np.tanh, -5, 5), "Erf": (_erf, -3, 3), "Relu": (lambda x: np.maximum(x, 0), -5, 5),
    "Softplus": (lambda x: np.log1p(np.exp(x)), -20, 20), "Softsign": (lambda x: x / (1 + np.abs(x)), -5, 5),
    "HardSwish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, -5, 5), "Mish": (lambda x: x * np.tanh(np.log1p(np.exp(x))), -5, 5),
    "Gelu": (lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), -4, 4), "Swish": (lambda x: x / (1 + np.exp(-x)), -5, 5),
}  # fmt: skip
SHAPES = [(), (1,), (7,), (3, 5), (0,), (2, 0, 3), (2, 3, 4, 5)]


def apply(op: str, *xs: Any, domain: str = "", **attrs: Any) -> Any:
    values = [ir.Value(name=f"v{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in range(len(xs))]
    node = make_node(op, values, attrs, domain=domain)
    return node_function(node)(*xs)


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unary_against_numpy(op: str, shape: tuple[int, ...]) -> None:
    fn, low, high = UNARY[op]
    x = np.random.default_rng(len(shape)).uniform(low, high, shape)
    want = np.asarray(fn(x)) if x.size else x
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        given = torch.from_numpy(x).to(dtype)
        got = apply(op, given)
        assert got.dtype == dtype
        assert got.shape == tuple(shape)
        exact = torch.from_numpy(np.asarray(fn(given.double().numpy()))) if x.size else got.double()
        bound = tolerance(OPS["", op].ulps, dtype) * max(float(exact.abs().max()) if x.size else 0, 1e-3) + 1e-12
        assert float((got.double() - exact).abs().max() if x.size else 0) <= bound
    assert want.shape == tuple(shape)


@pytest.mark.parametrize("op", ["Relu", "Exp", "Sigmoid", "Tanh", "Gelu", "HardSwish", "Sqrt", "Swish"])
def test_special_values(op: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40])
    got, wide = apply(op, x), apply(op, x.double())
    assert torch.equal(torch.isfinite(got), torch.isfinite(wide))


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, data=st.data())
def test_binary_broadcasting_against_numpy(shape: list[int], data: st.DataObject) -> None:
    other = [data.draw(st.sampled_from([1, s])) for s in shape][data.draw(st.integers(0, len(shape))) :]
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(shape), rng.uniform(0.5, 2, other)
    for op, fn in {
        "Add": np.add,
        "Sub": np.subtract,
        "Mul": np.multiply,
        "Div": np.divide,
        "Max": np.maximum,
        "Min": np.minimum,
    }.items():
        got = apply(op, torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)))
        np.testing.assert_allclose(got.numpy(), fn(a, b), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_reductions_against_numpy(shape: list[int], data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), unique_by=lambda a: a % len(shape), min_size=1))
    keep = data.draw(st.booleans())
    x = np.random.default_rng(1).standard_normal(shape)
    for op, fn in {
        "ReduceSum": np.sum,
        "ReduceMean": np.mean,
        "ReduceMax": np.max,
        "ReduceMin": np.min,
        "ReduceProd": np.prod,
    }.items():
        got = apply(op, torch.from_numpy(x), torch.tensor(axes), keepdims=int(keep))
        np.testing.assert_allclose(
            got.numpy(), fn(x, axis=tuple(a % len(shape) for a in axes), keepdims=keep), rtol=1e-10, atol=1e-12
        )


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 9), start=st.integers(-12, 12), end=st.integers(-12, 12), step=st.sampled_from([-3, -1, 1, 2])
)
def test_slice_against_numpy(size: int, start: int, end: int, step: int) -> None:
    x = torch.arange(size * 2).reshape(2, size)
    got = apply("Slice", x, *(torch.tensor([v]) for v in (start, end, 1, step)))
    if step < 0 and end < -size:
        want = x.numpy()[:, slice(start, None, step)]
    else:
        want = x.numpy()[:, slice(start, end, step)]
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64])
def test_integer_arithmetic_wraps_like_numpy(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    a = np.array([0, 1, 7, info.max, info.max - 1], dtype=str(dtype).split(".")[1])
    b = np.array([3, info.max, 2, info.max, 5], dtype=a.dtype)
    with np.errstate(all="ignore"):
        for op, fn in {
            "Add": np.add,
            "Sub": np.subtract,
            "Mul": np.multiply,
            "Max": np.maximum,
            "Less": np.less,
        }.items():
            got = apply(op, torch.from_numpy(a), torch.from_numpy(b))
            np.testing.assert_array_equal(got.numpy(), fn(a, b), err_msg=op)


# --- every tactic against the reference -----------------------------------------------------------------------------


def rand(*shape: int, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(np.float32)


def conv_case(
    n: int, cin: int, cout: int, k: int, size: int, act: str | None, residual: bool, **attrs: Any
) -> vt.Network:
    net = vt.Network("conv")
    dims = [size] * len(attrs.pop("nd", (0, 0)))
    x = net.input("x", (n, cin, *dims))
    y = net.conv(x, rand(cout, cin // attrs.get("group", 1), *[k] * len(dims)), rand(cout, seed=1), **attrs)
    if residual:
        y = y + net.input("r", y.shape)
    if act:
        y = getattr(net, act)(y)
    net.output("y", y)
    return net


def gemm_case(m: tuple[int, ...], k: int, n: int, act: str | None, bias: bool, residual: bool) -> vt.Network:
    net = vt.Network("gemm")
    y = net.input("x", (*m, k)) @ rand(k, n)
    y = y + rand(n, seed=1) if bias else y
    y = getattr(net, act)(y) if act else y
    y = y + net.input("r", (*m, n)) if residual else y
    net.output("y", y)
    return net


TACTIC_CASES: dict[str, vt.Network] = {
    **{
        f"conv-{a}-{r}": conv_case(2, 5, 7, 3, 9, a, r, pads=[1] * 4)
        for a in (None, "relu", "gelu", "hard_swish", "sigmoid", "tanh", "swish", "leaky_relu")
        for r in (False, True)
    },
    "conv-stride-dilation": conv_case(
        1, 3, 4, 3, 11, "relu", False, strides=[2, 2], dilations=[2, 1], pads=[2, 1, 2, 1]
    ),
    "conv-uneven-pads": conv_case(1, 3, 4, 3, 7, "relu", False, pads=[0, 1, 2, 1]),
    "conv-grouped": conv_case(2, 6, 9, 3, 8, None, False, group=3, pads=[1] * 4),
    "conv-depthwise": conv_case(2, 6, 6, 3, 8, "relu", True, group=6, pads=[1] * 4),
    "conv-1x1": conv_case(1, 16, 33, 1, 5, "relu", False),
    "conv-1d": conv_case(2, 4, 6, 3, 9, "relu", False, nd=(0,), pads=[1, 1]),
    "conv-3d": conv_case(1, 2, 3, 2, 5, "relu", False, nd=(0, 0, 0)),
    **{
        f"gemm-{a}-{b}-{r}": gemm_case((3, 5), 17, 9, a, b, r)
        for a in (None, "relu", "gelu", "tanh")
        for b in (False, True)
        for r in (False, True)
    },
    "gemm-vector-like": gemm_case((1,), 33, 5, "relu", True, False),
}


def region_of(net: vt.Network, precision: str) -> tuple[ir.Model, RegionView]:
    model = import_onnx(net.to_model())
    run_pipeline(model, PassContext(precision=precision))
    weights = stored_weights(model.graph)
    anchors = [n for n in model.graph if RegionView(n, weights).anchor.op_type in ("Conv", "MatMul", "Gemm")]
    return model, RegionView(anchors[0], weights)


@pytest.mark.parametrize("precision", ["model", "bf16"])
@pytest.mark.parametrize("name", TACTIC_CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "poisoned"])
def test_every_tactic_agrees_with_the_reference(name: str, precision: str, layout: str) -> None:
    _, region = region_of(TACTIC_CASES[name], precision)
    args = []
    for i, value in enumerate(region.dynamic):
        x = torch.from_numpy(rand(*[int(d) for d in value.shape], seed=5 + i))
        x = x.to(torch.bfloat16) if value.dtype == ir.DataType.BFLOAT16 else x
        if layout == "channels-last" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        if layout == "poisoned":
            x.view(-1)[[0, 1, 2]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=x.dtype)
        args.append(x)
    want = CPU.tactics[-1].bind(region, {}).run(*args)
    tried = 1
    for tactic in CPU.tactics[:-1]:
        configs = tactic.match(region)
        for config in configs if not isinstance(configs, str) else []:
            before = [a.clone() for a in args]
            got = tactic.bind(region, config).run(*args)
            assert disagreement(got, want, region_ulps(region)) is None, tactic.name
            for a, b in zip(args, before):
                assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"{tactic.name} changes its input"
            tried += 1
    assert tried >= 2, "at least two tactics must compete for convolutions and products"


def test_a_wrong_kernel_is_rejected() -> None:
    _, region = region_of(TACTIC_CASES["conv-relu-False"], "model")
    x = torch.from_numpy(rand(2, 5, 9, 9))
    want = CPU.tactics[-1].bind(region, {}).run(x)
    assert disagreement(want + 1e-3, want, region_ulps(region)) is not None
    assert disagreement(want.double(), want, 64) is not None
    assert disagreement(want[:1], want, 64) is not None
    bad = want.clone()
    bad.view(-1)[0] = math.nan
    assert disagreement(bad, want, 64) is not None
