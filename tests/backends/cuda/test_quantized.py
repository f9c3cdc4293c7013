"""Contractions of bytes by the generated kernels, run by Triton's interpreter, against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.backends.cpu.test_native_quantized import Model
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.backends.cuda.quantized_models import BACKEND, optimized, quantized_regions
from tests.backends.cuda.test_clusters import walk
from venturi.backends.base import RegionView, disagreement, region_slack, region_ulps
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.clusters import TritonPointwise
from venturi.backends.cuda.tactics.conv import ImplicitGemmConv, PixelProduct
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.pool import WindowPool
from venturi.backends.cuda.tactics.products import POINTERS, TMA, TMA_SPLIT, VECTOR
from venturi.backends.cuda.tactics.stem import StemConv
from venturi.engine.builder import stored_weights


def run_with(m, tactic, shape, output, limit=3):
    """How many Regions `tactic` takes; its results are the reference's bytes or, seldom, their neighbours."""
    inputs = {"x": torch.from_numpy(m.rng.standard_normal(shape).astype(np.float32))}
    used = 0
    for region, args, want in walk(optimized(m, shape, output), inputs):
        found = tactic.match(region)
        if not isinstance(found, str):
            used += 1
            for config in found[:limit]:
                got = tactic.bind(region, config).run(*args)
                assert got.dtype == want.dtype
                assert got.shape == want.shape
                if want.dtype == torch.float32:
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
                    continue
                assert disagreement(got, want, region_ulps(region), slack=region_slack(region)) is None, config
                assert float((got != want).float().mean()) < 0.01, config
                assert want.unique().numel() > 20, "a test of few values"
    return used


def numbers(m, scale):
    """An integer bias with a scale a channel."""
    stored = m.constant(m.rng.integers(-4000, 4000, scale).astype(np.int32))
    return m.add("DequantizeLinear", [stored, m.constant(np.full(scale, 1e-4, np.float32))], axis=0)


ZEROS = [("u8", 0), ("u8", 117), ("s8", 0), ("s8", -9)]
CONVS = [
    (ImplicitGemmConv, (2, 64, 9, 11), 48, 3, 1, [1, 1, 1, 1]),
    (ImplicitGemmConv, (1, 5, 8, 8), 19, 3, 1, [1, 1, 1, 1]),
    (ImplicitGemmConv, (1, 72, 6, 5), 16, 3, 2, [0, 1, 2, 1]),
    (StemConv, (1, 3, 17, 18), 32, 7, 2, [3, 3, 3, 3]),
]


@pytest.mark.parametrize("kind, zero", ZEROS)
@pytest.mark.parametrize("tactic, shape, out, kernel, stride, pads", CONVS, ids=lambda v: getattr(v, "name", str(v)))
def test_convolutions(tactic, shape, out, kernel, stride, pads, kind, zero):
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    y = m.add("Conv", [x, m.weight((out, shape[1], kernel, kernel), 0), numbers(m, out)], kernel_shape=[kernel] * 2,
              strides=[stride] * 2, pads=pads)  # fmt: skip
    y = m.quantized(m.add("Relu", [y]), 0.05, zero)
    assert run_with(m, tactic(InterpretedDevice()), shape, y) == 1


@pytest.mark.parametrize("kind, zero", [("u8", 30), ("s8", 0)])
@pytest.mark.parametrize("kernel", [TMA, TMA_SPLIT, POINTERS], ids=lambda k: k.suffix)
def test_pixels_with_a_residual_and_roundings_between(kernel, kind, zero):
    """As onnxruntime exports it: every value rounded, so the chain has three QuantizeLinear."""
    m = Model(kind)
    x = m.quantized("x", 0.02, zero)
    y = m.quantized(m.add("Conv", [x, m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1]), 0.04, zero)
    y = m.quantized(m.add("Add", [y, x]), 0.05, zero)
    y = m.quantized(m.add("Relu", [y]), 0.03, zero)
    assert run_with(m, PixelProduct(InterpretedDevice(), kernel), (2, 64, 6, 7), y) == 1
    assert sum(n.op_type == "Region" for n in optimized(m, (2, 64, 6, 7), y).graph) == 1


@pytest.mark.parametrize("ends", [True, False], ids=["bytes", "fp32"])
@pytest.mark.parametrize(
    "kernel, rows, n, k", [(TMA, 33, 48, 96), (TMA_SPLIT, 64, 64, 256), (POINTERS, 19, 40, 70), (VECTOR, 3, 40, 70)]
)
def test_products(kernel, rows, n, k, ends):
    m = Model("s8")
    x = m.quantized("x", 0.02, 3)
    y = m.add("MatMul", [x, m.weight((k, n), 1)])
    y = m.add("Add", [y, m.constant(m.rng.standard_normal(n).astype(np.float32))])
    y = m.quantized(m.add("Gelu", [y]), 0.05, -5) if ends else m.add("Relu", [y])
    assert run_with(m, Gemm(InterpretedDevice(), kernel), (rows, k), y, limit=20) == 1


def test_what_a_rounding_within_may_add():
    """One step of 0.04 and one of 0.05 are three of 0.03; without roundings within there is nothing to add."""
    m = Model("s8")
    x = m.quantized("x", 0.02, 0)
    y = m.quantized(m.add("Conv", [x, m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1]), 0.04, 0)
    y = m.quantized(m.add("Relu", [m.quantized(m.add("Add", [y, x]), 0.05, 0)]), 0.03, 0)
    (region,) = quantized_regions(optimized(m, (2, 64, 6, 7), y))
    assert region_slack(region) == pytest.approx(3.0, rel=1e-5)
    m = Model("s8")
    y = m.add("Conv", [m.quantized("x", 0.02, 0), m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1])
    (region,) = quantized_regions(optimized(m, (2, 64, 6, 7), m.quantized(y, 0.04, 0)))
    assert region_slack(region) == 0
    three, four = torch.tensor([3], dtype=torch.int8), torch.tensor([4], dtype=torch.int8)
    assert disagreement(three, four * 0, 1, slack=2.0) is None
    assert disagreement(four, four * 0, 1, slack=2.0) is not None


def test_a_sum_of_bytes_that_fp32_could_not_hold():
    """Split or not, sums stay integers: 127 * 127 * 4608 has more than 24 bits."""
    m = Model("s8")
    w = m.constant(np.full((4608, 16), 127, np.int8))
    w = m.add("DequantizeLinear", [w, m.constant(np.float32(1e-3))])
    y = m.add("MatMul", [m.quantized("x", 0.001, 0), w])
    model = optimized(m, (16, 4608), y)
    (region,) = quantized_regions(model)
    x = torch.full((16, 4608), 127, dtype=torch.int8)
    x[:, 0] = 126
    device = InterpretedDevice()
    device.num_sms = 132
    tactic = Gemm(device, POINTERS)
    configs = tactic.match(region)
    assert max(c["split"] for c in configs) > 1
    for config in sorted(configs, key=lambda c: -c["split"])[:2]:
        got = tactic.bind(region, config).run(x)
        want = float(np.float32(127 * 127 * 4608 - 127) * np.float32(1e-3 * 0.001))
        torch.testing.assert_close(got, torch.full((16, 16), want), rtol=2e-7, atol=0)


def test_pooling_of_bytes():
    m = Model("s8")
    y = m.add("Conv", [m.quantized("x", 0.02, 3), m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1])
    y = m.quantized(y, 0.05, 3)
    y = m.add("MaxPool", [y], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = m.add("Conv", [y, m.weight((32, 64, 1, 1), 0)], kernel_shape=[1, 1])
    assert run_with(m, WindowPool(InterpretedDevice()), (1, 64, 9, 9), y) == 1


@pytest.mark.parametrize("kind, zero", ZEROS)
def test_rounding_alone(kind, zero):
    """Half to even, saturating; NaN and infinities as the reference."""
    m = Model(kind)
    made = m.add("QuantizeLinear", ["x", *m.numbers(0.5, zero)])
    model = optimized(m, (8, 256), m.add("DequantizeLinear", [made, *m.numbers(0.5, zero)]))
    weights = stored_weights(model.graph)
    x = torch.arange(-1024, 1024).reshape(8, 256) * 0.25
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for node in model.graph:
        region = RegionView(node, weights)
        tactic = TritonPointwise(InterpretedDevice())
        want = Reference().bind(region, {}).run(x)
        assert torch.equal(tactic.bind(region, tactic.match(region)[0]).run(x), want)
        x = want


def test_what_is_left_to_others():
    """Two scales along the wrong axis, asymmetric weights, and libraries that know halves only."""
    m = Model("s8")
    y = m.add("MatMul", [m.quantized("x", 0.02, 3), m.weight((64, 64), 0)])
    model = optimized(m, (32, 64), y)
    (region,) = quantized_regions(model)
    assert "along another axis" in Gemm(OfflineDevice(90), POINTERS).match(region)
    m = Model("s8")
    y = m.add("MatMul", [m.quantized("x", 0.02, 3), m.weight((64, 64), 1)])
    model = optimized(m, (32, 64), y)
    (region,) = quantized_regions(model)
    for name in ("cublaslt", "cudnn-conv", "aten-cudnn"):
        refused = [t.match(region) for t in BACKEND.tactics if name in t.name]
        assert refused
        assert all(isinstance(r, str) for r in refused), name
