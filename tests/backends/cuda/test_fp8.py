"""Contractions of e4m3 by the generated kernels, run by Triton's interpreter, against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.backends.cuda.fp8_models import convolution, product
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.backends.cuda.quantized_models import optimized, quantized_regions
from tests.backends.cuda.test_clusters import walk
from venturi.backends.base import disagreement, region_ulps
from venturi.backends.cuda.backend import FP8_ARCH, cuda_backend
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.conv import ImplicitGemmConv, PixelProduct
from venturi.backends.cuda.tactics.early import EARLY
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.pingpong import PINGPONG
from venturi.backends.cuda.tactics.products import POINTERS, TMA, TMA_SPLIT, VECTOR


def run_with(made, tactic):
    """How many Regions `tactic` takes; its results are the reference's numbers, roundings to e4m3 one step apart."""
    m, shape, output = made
    inputs = {"x": torch.from_numpy(m.rng.standard_normal(shape).astype(np.float32))}
    used = 0
    for region, args, want in walk(optimized(m, shape, output), inputs):
        found = tactic.match(region)
        if not isinstance(found, str):
            used += 1
            for config in found[:2]:
                got = tactic.bind(region, config).run(*args)
                assert disagreement(got, want, region_ulps(region)) is None, config
                assert got.float().unique().numel() > 20, "a test of few values"
                same = got.float() if got.dtype == torch.float32 else (got.float() == want.float()).float()
                assert got.dtype == torch.float32 or float(same.mean()) > 0.99
    return used


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("kernel", [TMA, TMA_SPLIT, POINTERS], ids=lambda k: k.suffix)
@pytest.mark.parametrize("axis", [1, None])
def test_products(kernel, end, axis):
    assert run_with(product(end, axis=axis, n=48, k=96), Gemm(InterpretedDevice(), kernel)) == 1


def test_products_of_few_rows_and_odd_sizes():
    assert run_with(product(rows=1, n=37, k=50), Gemm(InterpretedDevice(), VECTOR)) == 1
    assert run_with(product(rows=19, n=37, k=50), Gemm(InterpretedDevice(), POINTERS)) == 1


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("channels, end, residual", [(64, True, True), (64, False, False), (5, True, False)])
def test_convolutions(channels, end, residual, folds):
    made = convolution(residual, end, outputs=channels, channels=channels, folds=folds)
    assert run_with(made, ImplicitGemmConv(InterpretedDevice())) == 1


def test_pointwise_convolutions_as_products():
    assert run_with(convolution(kernel=1), PixelProduct(InterpretedDevice(), TMA)) == 1


@pytest.mark.parametrize("kernel", [PINGPONG, EARLY], ids=lambda k: k.suffix)
def test_kernels_of_other_types_refuse(kernel):
    m, shape, output = product()
    (region,) = quantized_regions(optimized(m, shape, output))
    assert isinstance(Gemm(OfflineDevice(90), kernel).match(region), str)


def test_devices_without_e4m3_leave_it_to_the_reference():
    old, new = (cuda_backend(OfflineDevice(arch), torch.device("cpu")) for arch in (80, 90))
    assert new.fuses_fp8
    assert not old.fuses_fp8
    assert FP8_ARCH == 89


def test_numbers_of_one_step_more_or_less_are_accepted_and_no_others():
    want = torch.tensor([1.0, 0.0156, 0.0, -40.0, 1.0]).to(torch.float8_e4m3fn)
    steps = [0.125, 2.0**-9, 2.0**-9, -4.0, 0.0]
    near = (want.float() + torch.tensor(steps)).to(torch.float8_e4m3fn)
    far = (want.float() + torch.tensor(steps) * 2).to(torch.float8_e4m3fn)
    assert disagreement(near, want, 64.0) is None
    assert disagreement(near, want, 0.0) is not None
    for i in range(4):
        other = near.clone()
        other[i] = far[i]
        assert disagreement(other, want, 64.0) is not None, i


def test_a_region_ends_with_its_rounding():
    m, shape, output = product()
    model = optimized(m, shape, output)
    (region,) = quantized_regions(model)
    assert [n.op_type for n in region.nodes][-1] == "QuantizeLinear"
