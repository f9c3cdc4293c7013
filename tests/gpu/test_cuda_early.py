"""Kernels with all operands in flight, on the device: every candidate, odd sizes, NaN, and runs back to back."""

from __future__ import annotations

import pytest
import torch

from tests.backends.cuda.test_early import convolution, product
from venturi.backends.base import disagreement, region_ulps
from venturi.backends.cuda.backend import exact
from venturi.backends.cuda.device import DeviceWeights, open_device
from venturi.backends.cuda.placement import OnDevice
from venturi.backends.cuda.store import KernelStore
from venturi.backends.cuda.tactics.early import EARLY, EarlyConv
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.core.errors import TuningError

pytestmark = pytest.mark.gpu


def check(region, tactic, candidates, *shape, residual=()):
    """All candidates against plain algorithms, on fresh inputs, then ten runs in a row bit for bit. A `residual` is the
    region's first or last input, whichever has its shape."""
    region.weights = DeviceWeights(region.weights, torch.device("cuda"))
    tactic._device.store.compile(s for c in candidates for s in tactic.sources(region, c))
    x = torch.randn(shape, device="cuda").half()
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    poisoned = x.clone(memory_format=torch.preserve_format)
    first = (0,) * len(shape)
    last = tuple(n - 1 for n in shape)
    poisoned[first], poisoned[last] = float("nan"), float("inf")
    reference = DeviceReference().bind(region, {})
    inputs, poison = with_residual(region, residual, x), with_residual(region, residual, poisoned)
    with exact():
        want, want_poisoned = reference.run(*inputs), reference.run(*poison)
    for config in candidates:
        try:
            kernel = OnDevice(tactic, x.device).bind(region, config)
        except TuningError as exc:
            assert "spills" in str(exc), exc
            continue
        got = kernel.run(*inputs)
        assert disagreement(got, want, region_ulps(region)) is None, config
        assert disagreement(kernel.run(*poison), want_poisoned, region_ulps(region)) is None, config
        for again in [kernel.run(*inputs) for _ in range(10)]:
            same = again.eq(got) | (again.isnan() & got.isnan())
            assert bool(same.all()), (config, int((~same).sum()), float((again.float() - got.float()).abs().max()))


def with_residual(region, shape, x):
    """The region's inputs in their order."""
    if not shape:
        return [x]
    other = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5)).half()
    other = other.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else other
    first = list(region.dynamic[0].shape or ()) == list(shape)
    return [other, x] if first else [x, other]


@pytest.fixture(scope="module")
def device():
    return open_device("cuda", KernelStore())


@pytest.mark.parametrize(
    "rows, n, k", [(128, 768, 3072), (128, 2304, 768), (16, 8, 8), (1000, 40, 200), (97, 1000, 72), (3137, 256, 64)]
)
def test_products(device, rows, n, k):
    region, _ = product(rows, n, k)
    tactic = Gemm(device, EARLY)
    check(region, tactic, tactic.match(region), rows, k)


@pytest.mark.parametrize(
    "size, c, k, r, attrs",
    [
        ((1, 14, 14), 256, 256, 3, {"pads": [1, 1, 1, 1]}),
        ((5, 7, 7), 512, 136, 3, {"pads": [1, 1, 1, 1]}),
        ((3, 9, 11), 64, 40, 3, {"pads": [2, 0, 1, 3], "dilations": [2, 1]}),
        ((2, 28, 28), 128, 128, 3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((1, 56, 56), 256, 512, 1, {"strides": [2, 2]}),
        ((4, 10, 6), 64, 72, 5, {"pads": [2, 1, 1, 2], "strides": [2, 2]}),
    ],
)
def test_convolutions(device, size, c, k, r, attrs):
    region, _ = convolution(size, c, k, r, **attrs)
    tactic = EarlyConv(device)
    check(region, tactic, tactic.match(region), size[0], c, *size[1:])
