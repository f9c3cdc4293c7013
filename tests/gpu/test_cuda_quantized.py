"""Contractions of bytes on the device: every candidate of every tactic, then runs back to back."""

from __future__ import annotations

import pytest
import torch

from tests.backends.cpu.test_native_quantized import Model
from tests.backends.cuda.quantized_models import optimized, quantized_regions
from tests.gpu.test_cuda_early import device  # noqa: F401
from venturi.backends.base import RegionView, disagreement, region_slack, region_ulps
from venturi.backends.cuda.backend import cuda_backend, exact
from venturi.backends.cuda.device import DeviceWeights
from venturi.backends.cuda.placement import sources_of
from venturi.backends.cuda.tactics.pool import WindowPool
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.core.errors import TuningError
from venturi.engine.builder import stored_weights
from venturi.ops.tensors import STORAGE

pytestmark = pytest.mark.gpu


def check(device, region, expected):  # noqa: F811
    """All candidates against plain algorithms on fresh inputs; ten runs in a row bit for bit.

    The models' scales have no simple ratios: where sums of stored integers fall on ties, either neighbour is right.
    """
    place = torch.device("cuda", 0)
    region.weights = DeviceWeights(region.weights, place)
    args = [torch.randint(-24, 25, list(v.shape), dtype=torch.int8, device=place) for v in region.dynamic]
    args = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args]
    with exact():
        want = DeviceReference().bind(region, {}).run(*args)
    assert want.unique().numel() > 20, "a test of few values"
    used = set()
    for tactic in cuda_backend(device, place).tactics[:-1]:
        configs = tactic.match(region)
        if isinstance(configs, str):
            continue
        used.add(tactic.name)
        device.store.compile(s for c in configs for s in sources_of(tactic, region, c))
        for config in configs:
            try:
                kernel = tactic.bind(region, config)
            except TuningError as exc:
                assert "spills" in str(exc) or "shared memory" in str(exc), exc
                continue
            got = kernel.run(*args)
            about = (tactic.name, config)
            assert disagreement(got, want, region_ulps(region), slack=region_slack(region)) is None, about
            if got.dtype == torch.int8:
                assert float((got != want).float().mean()) < 0.01, about
            for again in [kernel.run(*args) for _ in range(10)]:
                assert torch.equal(again, got), about
    assert used >= expected


CONVS = [
    ((8, 128, 28, 28), 128, 3, 1, 1, {"triton-conv", "triton-conv-early"}),
    ((64, 64, 28, 28), 64, 3, 1, 1, {"triton-conv", "triton-conv-pingpong"}),
    ((32, 256, 14, 14), 256, 3, 2, 1, {"triton-conv", "triton-conv-early"}),
    ((48, 128, 30, 22), 144, 3, 1, 1, {"triton-conv-pingpong"}),
    ((32, 3, 65, 67), 64, 7, 2, 3, {"triton-conv-stem", "triton-conv-stem-strips"}),
    ((5, 24, 9, 11), 40, 3, 1, 1, {"triton-conv"}),
]


@pytest.mark.parametrize(
    "shape, out, kernel, stride, pad, expected", CONVS, ids=lambda v: str(v) if not isinstance(v, set) else ""
)
@pytest.mark.parametrize("zero", [0, -9])
def test_convolutions(device, shape, out, kernel, stride, pad, expected, zero):  # noqa: F811
    m = Model("s8")
    x = m.quantized("x", 0.02, zero)
    y = m.add("Conv", [x, m.weight((out, shape[1], kernel, kernel), 0), m.constant(m.rng.standard_normal(out).astype("f"))],
              kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)  # fmt: skip
    boxes = {"triton-conv-early", "triton-conv-pingpong"}
    y = m.quantized(m.add("Relu", [y]), 0.2, zero)
    (region,) = quantized_regions(optimized(m, shape, y))
    check(device, region, expected if zero == 0 else expected - boxes)


@pytest.mark.parametrize(
    "shape, out", [((32, 64, 56, 56), 256), ((8, 512, 7, 7), 2048), ((33, 48, 15, 13), 80)], ids=str
)
def test_pixels_with_a_residual_and_roundings_between(device, shape, out):  # noqa: F811
    m = Model("s8")
    x = m.quantized("x", 0.02, 3)
    y = m.quantized(m.add("Conv", [x, m.weight((out, shape[1], 1, 1), 0)], kernel_shape=[1, 1]), 0.0611, 1)
    skip = m.quantized(m.add("Conv", [x, m.weight((out, shape[1], 1, 1), 0)], kernel_shape=[1, 1]), 0.0473, 0)
    y = m.quantized(m.add("Relu", [m.quantized(m.add("Add", [y, skip]), 0.0581, 0)]), 0.0437, 0)
    model = optimized(m, shape, y)
    assert sorted(len(r.dynamic) for r in quantized_regions(model)) == [1, 2]
    region = next(r for r in quantized_regions(model) if len(r.dynamic) == 2)
    check(device, region, {"triton-conv-1x1-tma", "triton-conv-1x1-tma-split", "triton-conv"})


@pytest.mark.parametrize(
    "rows, k, n", [(8192, 768, 768), (128, 3072, 768), (97, 80, 48), (16, 2048, 1000), (3, 70, 40)]
)
@pytest.mark.parametrize("ends", [True, False], ids=["bytes", "fp32"])
def test_products(device, rows, k, n, ends):  # noqa: F811
    m = Model("s8")
    y = m.add("MatMul", [m.quantized("x", 0.02, 5), m.weight((k, n), 1)])
    y = m.add("Add", [y, m.constant(m.rng.standard_normal(n).astype("f"))])
    y = m.quantized(m.add("Gelu", [y]), 0.05, -5) if ends else m.add("Relu", [y])
    (region,) = quantized_regions(optimized(m, (rows, k), y))
    check(device, region, {"triton-gemm"})


@pytest.mark.parametrize("kind", ["s8", "u8"])
def test_pooling(device, kind):  # noqa: F811
    """All bytes there are, in every candidate."""
    m = Model(kind)
    y = m.add("Conv", [m.quantized("x", 0.02, 3), m.weight((64, 64, 1, 1), 0)], kernel_shape=[1, 1])
    y = m.add("MaxPool", [m.quantized(y, 0.05, 3)], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    model = optimized(m, (3, 64, 19, 21), m.add("Conv", [y, m.weight((32, 64, 1, 1), 0)], kernel_shape=[1, 1]))
    weights, tactic, place = stored_weights(model.graph), WindowPool(device), torch.device("cuda", 0)
    pools = [r for r in (RegionView(n, weights) for n in model.graph) if not isinstance(tactic.match(r), str)]
    assert len(pools) == 1
    dtype = STORAGE[pools[0].dynamic[0].dtype]
    limits = torch.iinfo(dtype)
    x = torch.randint(limits.min, limits.max + 1, (3, 64, 19, 21), dtype=dtype, device=place)
    x = x.contiguous(memory_format=torch.channels_last)
    want = torch.nn.functional.max_pool2d(x.float(), 3, 2, 1).to(dtype)
    for config in tactic.match(pools[0]):
        assert torch.equal(tactic.bind(pools[0], config).run(x), want), config
