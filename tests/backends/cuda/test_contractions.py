"""Generated product and convolution kernels, run by Triton's interpreter, against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.backends.cuda.test_clusters import run_all, tensor, walk
from tests.passes.harness import optimize
from venturi.backends.base import disagreement, region_ulps
from venturi.backends.cuda.tactics.conv import DepthwiseConv, ImplicitGemmConv, PixelProduct
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.pool import ImageMean, WindowPool
from venturi.backends.cuda.tactics.products import POINTERS, TMA, TMA_SPLIT, VECTOR
from venturi.backends.cuda.tactics.stem import StemConv


def weight(*shape, seed=5):
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "tf32"])
@pytest.mark.parametrize("kernel", [TMA, TMA_SPLIT, POINTERS], ids=lambda k: k.suffix)
@pytest.mark.parametrize("m,n,k", [(17, 24, 40), (64, 64, 64), (33, 128, 200)])
def test_products_with_bias_residual_and_activation(kernel, m, n, k, precision):
    net = vt.Network()
    x, skip = net.input("x", (m, k)), net.input("skip", (m, n))
    net.output("y", net.gelu(x @ weight(k, n) + weight(n, seed=6)) + skip)
    inputs = {"x": tensor(m, k), "skip": tensor(m, n, seed=3, special=False)}
    assert run_all(net, Gemm(InterpretedDevice(), kernel), inputs, precision) == 1


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_split_the_sum(rows, precision):
    net = vt.Network()
    x = net.input("x", (rows, 2, 1024))
    net.output("y", net.relu(x @ weight(1024, 36)))
    device = InterpretedDevice()
    device.num_sms = 132
    tactic = Gemm(device, POINTERS)
    assert run_all(net, tactic, {"x": tensor(rows, 2, 1024, special=False)}, precision) == 1
    used = [c["split"] for n in [net] for c in _configs(n, tactic, precision)]
    assert max(used) > 1


def _configs(net, tactic, precision):
    from venturi.backends.base import RegionView
    from venturi.engine.builder import stored_weights

    model = optimize(net, precision)
    found = [tactic.match(RegionView(n, stored_weights(model.graph))) for n in model.graph]
    return next(f for f in found if not isinstance(f, str))


@pytest.mark.parametrize("kernel", [TMA, POINTERS], ids=lambda k: k.suffix)
def test_long_sums_of_fp32_may_be_rounded_at_every_step(kernel):
    net = vt.Network()
    net.output("y", net.input("x", (17, 2048)) @ weight(2048, 16))
    inputs = {"x": tensor(17, 2048)}
    ((region, args, want),) = walk(optimize(net), inputs)
    tactic = Gemm(InterpretedDevice(), kernel)
    (config, *_) = [c for c in tactic.match(region) if c["rounded"]]
    assert disagreement(tactic.bind(region, config).run(*args), want, region_ulps(region)) is None


def test_odd_sizes_are_refused_by_tma_only():
    net = vt.Network()
    x = net.input("x", (20, 30))
    net.output("y", x @ weight(30, 7))
    assert run_all(net, Gemm(InterpretedDevice(), TMA), {"x": tensor(20, 30)}, "fp16") == 0
    assert run_all(net, Gemm(InterpretedDevice(), POINTERS), {"x": tensor(20, 30)}, "fp16") == 1


CONVS = [
    dict(c=16, k=24, r=3, pads=[1, 1, 1, 1]),
    dict(c=3, k=16, r=7, pads=[3, 3, 3, 3], strides=[2, 2]),
    dict(c=64, k=32, r=3, pads=[1, 1, 1, 1], strides=[2, 2]),
    dict(c=8, k=16, r=3, pads=[0, 1, 2, 1], dilations=[2, 1]),
    dict(c=64, k=40, r=1, strides=[2, 2]),
]


@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
@pytest.mark.parametrize("spec", CONVS, ids=lambda s: f"c{s['c']}k{s['k']}r{s['r']}")
def test_convolutions(spec, precision):
    spec = dict(spec)
    c, k, r = spec.pop("c"), spec.pop("k"), spec.pop("r")
    net = vt.Network()
    x = net.input("x", (2, c, 11, 9))
    y = net.relu(net.conv(x, weight(k, c, r, r), weight(k, seed=8), **spec))
    net.output("y", net.conv(y, weight(8, k, 1, 1), weight(8, seed=9)))
    used = run_all(net, ImplicitGemmConv(InterpretedDevice()), {"x": tensor(2, c, 11, 9)}, precision)
    assert used == 2


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("kernel", [TMA, TMA_SPLIT], ids=lambda k: k.suffix)
def test_pointwise_convolution_with_residual_as_a_product(kernel, precision):
    net = vt.Network()
    x, skip = net.input("x", (2, 16, 5, 7)), net.input("skip", (2, 32, 5, 7))
    y = net.relu(net.conv(x, weight(32, 16, 1, 1), weight(32, seed=8)) + skip)
    net.output("y", net.conv(y, weight(8, 32, 1, 1), weight(8, seed=9)))
    inputs = {"x": tensor(2, 16, 5, 7, special=False), "skip": tensor(2, 32, 5, 7, seed=4)}
    assert run_all(net, PixelProduct(InterpretedDevice(), kernel), inputs, precision) == 2


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(stride, precision):
    net = vt.Network()
    x = net.input("x", (2, 40, 9, 8))
    y = net.conv(x, weight(40, 1, 5, 5), weight(40, seed=8), group=40, pads=[2, 2, 2, 2], strides=[stride, stride])
    net.output("y", net.hard_swish(y))
    device = InterpretedDevice()
    assert run_all(net, DepthwiseConv(device), {"x": tensor(2, 40, 9, 8)}, precision) == 1
    assert device.launched == ["depthwise"] * 2


def test_grouped_convolutions_are_refused():
    net = vt.Network()
    x = net.input("x", (2, 16, 5, 5))
    net.output("y", net.conv(x, weight(16, 4, 3, 3), group=4))
    assert run_all(net, ImplicitGemmConv(InterpretedDevice()), {"x": tensor(2, 16, 5, 5)}, "fp16") == 0
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_few_rows_without_tensor_cores(precision):
    net = vt.Network()
    x, skip = net.input("x", (3, 300)), net.input("skip", (3, 37))
    net.output("y", net.relu(x @ weight(300, 37) + weight(37, seed=6)) + skip)
    inputs = {"x": tensor(3, 300), "skip": tensor(3, 37, seed=3)}
    assert run_all(net, Gemm(InterpretedDevice(), VECTOR), inputs, precision) == 1


def squeeze(keepdims=1):
    net = vt.Network()
    x = net.input("x", (2, 40, 9, 8))
    y = net.conv(x, weight(40, 40, 1, 1))
    pooled = net.reduce_mean(y, np.array([2, 3], dtype=np.int64), keepdims=keepdims)
    if keepdims:
        pooled = y * net.sigmoid(net.conv(net.relu(net.conv(pooled, weight(10, 40, 1, 1))), weight(40, 10, 1, 1)))
    net.output("y", pooled)
    return net


@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_over_images(keepdims):
    device = InterpretedDevice()
    assert run_all(squeeze(keepdims), ImageMean(device), {"x": tensor(2, 40, 9, 8)}, "fp16") == 1
    assert device.launched == ["mean"] * 2


def test_squeeze_and_excitation_layers_as_vector_products():
    assert run_all(squeeze(), PixelProduct(InterpretedDevice(), VECTOR), {"x": tensor(2, 40, 9, 8)}, "fp16") == 2


@pytest.mark.parametrize(
    "op,attrs",
    [
        ("max_pool", dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
        ("max_pool", dict(kernel_shape=[2, 3], dilations=[2, 1])),
        ("average_pool", dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
        ("average_pool", dict(kernel_shape=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1)),
    ],
)
def test_window_pooling(op, attrs):
    net = vt.Network()
    x = net.input("x", (2, 40, 9, 8))
    y = net.conv(x, weight(40, 40, 1, 1))
    net.output("y", net.conv(getattr(net, op)(y, **attrs), weight(8, 40, 1, 1)))
    device = InterpretedDevice()
    assert run_all(net, WindowPool(device), {"x": tensor(2, 40, 9, 8)}, "fp16") == 1
    assert device.launched


@pytest.mark.parametrize(
    "c,r,stride,pads,size",
    [
        (3, 7, 2, [3, 3, 3, 3], (17, 20)),
        (3, 3, 2, [1, 1, 1, 1], (12, 9)),
        (3, 4, 4, [0, 0, 0, 0], (16, 12)),
        (1, 5, 3, [2, 1, 2, 1], (14, 11)),
        (4, 2, 2, [0, 1, 1, 0], (9, 9)),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
def test_strided_stems_by_space_to_depth(c, r, stride, pads, size, precision):
    net = vt.Network()
    x = net.input("x", (2, c, *size))
    y = net.conv(x, weight(24, c, r, r), weight(24, seed=8), strides=[stride, stride], pads=pads)
    net.output("y", net.relu(y))
    device = InterpretedDevice()
    assert run_all(net, StemConv(device), {"x": tensor(2, c, *size)}, precision) == 1
    assert device.launched[:2] == ["blocks", "stem"]
