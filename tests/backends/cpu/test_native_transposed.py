"""Transposed convolutions by blocks, in generated code: every candidate against the reference, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import venturi as vt
from tests.backends.cpu.harness import isas
from tests.passes.harness import optimize, rand
from venturi.backends.base import RegionView, disagreement, region_ulps
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.tactics import native_transposed
from venturi.backends.cpu.tactics.native_transposed import NativeTransposed
from venturi.backends.cpu.tactics.reference import Reference
from venturi.engine.builder import stored_weights

T = torch.Tensor
ISAS = pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
# channels, outputs, block, batch, height, width
SHAPES = [(5, 19, (2, 2), 2, 7, 9), (32, 16, (2, 2), 1, 6, 14), (17, 3, (3, 2), 3, 1, 5), (8, 40, (1, 4), 1, 3, 1)]


def network(shape: Any, ending: str = "", **attrs: Any) -> vt.Network:
    c, k, block, n, h, w = shape
    net = vt.Network()
    x = net.input("x", (n, c, h, w))
    y = net.conv_transpose(x, rand(c, k, *block), rand(k, seed=1), **({"strides": list(block)} | attrs))
    if ending == "residual":
        y = net.relu(y + net.input("skip", (n, k, h * block[0], w * block[1])))
    net.output("y", net.gelu(y) if ending == "gelu" else y)
    return net


def transposed(net: vt.Network, precision: str = "model") -> RegionView:
    graph = optimize(net, precision).graph
    weights = stored_weights(graph)
    regions = (RegionView(n, weights) for n in graph)
    return next(r for r in regions if r.anchor.op_type == "ConvTranspose")


def image(shape: Any, seed: int = 0, special: bool = False) -> T:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if special:
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return x


@ISAS
@pytest.mark.parametrize("ending", ["", "gelu", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_of_every_pixel(isa: Isa, shape: Any, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_transposed, "host", lambda: isa)
    c, k, (s, t), n, h, w = shape
    region = transposed(network(shape, ending))
    args = [image((n, c, h, w), special=True), *([image((n, k, h * s, w * t), 1)] if ending == "residual" else [])]
    want = Reference().bind(region, {}).run(*args)
    configs = NativeTransposed().match(region)
    assert isinstance(configs, list)
    for config in configs:
        got = NativeTransposed().bind(region, config).run(*args)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert disagreement(got, want, region_ulps(region)) is None, config


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bf16(shape: Any) -> None:
    isa = host()
    if isinstance(isa, str) or not isa.unit(quantized=False):
        pytest.skip("the CPU does not multiply bf16")
    c, _, _, n, h, w = shape
    region = transposed(network(shape, "gelu"), "bf16")
    x = image((n, c, h, w), special=True).bfloat16()
    want = Reference().bind(region, {}).run(x)
    configs = NativeTransposed().match(region)
    assert isinstance(configs, list)
    for config in configs[:3]:
        got = NativeTransposed().bind(region, config).run(x)
        assert disagreement(got, want, region_ulps(region)) is None, config


def test_other_sizes_and_empty_images() -> None:
    net = vt.Network()
    x = net.input("x", ("n", 8, "h", "w"))
    net.output("y", net.conv_transpose(x, rand(8, 4, 2, 2), strides=[2, 2]))
    region = transposed(net)
    configs = NativeTransposed().match(region)
    assert isinstance(configs, list)
    kernel = NativeTransposed().bind(region, configs[0])
    for size in ((1, 8, 3, 5), (2, 8, 6, 1), (0, 8, 3, 3)):
        given = image(size)
        want = Reference().bind(region, {}).run(given)
        assert disagreement(kernel.run(given), want, region_ulps(region)) is None


@pytest.mark.parametrize(
    "attrs",
    [dict(pads=[1, 1, 0, 0]), dict(output_padding=[1, 0]), dict(strides=[3, 3]), dict(strides=[1, 1]),
     dict(dilations=[2, 2]), dict(auto_pad="SAME_UPPER"), dict(output_shape=[13, 17])],
    ids=str,
)  # fmt: skip
def test_blocks_that_overlap_or_are_cut_are_refused(attrs: Any) -> None:
    region = transposed(network((5, 19, (2, 2), 2, 7, 9), **attrs))
    assert isinstance(NativeTransposed().match(region), str)


def test_an_engine_takes_it() -> None:
    shape = (16, 8, (2, 2), 1, 5, 6)
    engine = vt.build(network(shape, "gelu"), device="cpu", opt_level=0)
    assert np.isfinite(engine(rand(1, 16, 5, 6))).all()
