"""What fp32 may be rounded to: torch's switches, the measure that candidates are held to, weights in two parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import venturi as vt
from tests.passes.harness import optimize, rand
from venturi.backends.base import RegionView, region_ulps
from venturi.backends.cuda.backend import exact
from venturi.backends.cuda.codegen.dots import stored
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.rounding import products_of_fp32
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.engine.builder import stored_weights
from venturi.ir.dtypes import DT

FP32, TF32 = Element(DT.FLOAT), Element(DT.FLOAT, tf32=True)


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_switches_of_the_process_are_put_back(tf32):
    before, seen = switches(), []

    def fail():
        with products_of_fp32(tf32=tf32):
            seen.append(switches())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [(tf32, tf32)]
    assert switches() == before


def test_overlapping_calls_round_only_if_all_may_and_the_last_puts_the_switches_back():
    before, rounded, exactly = switches(), ExitStack(), ExitStack()
    rounded.enter_context(products_of_fp32(tf32=True))
    assert switches() == (True, True)
    exactly.enter_context(products_of_fp32(tf32=False))
    assert switches() == (False, False)
    exactly.close()
    assert switches() == (True, True)
    exactly.enter_context(products_of_fp32(tf32=False))
    rounded.close()
    assert switches() == (False, False)
    exactly.close()
    assert switches() == before


def test_many_threads_leave_the_switches_as_they_were():
    before = switches()

    def calls(tf32):
        for _ in range(300):
            with products_of_fp32(tf32=tf32):
                assert tf32 or switches() == (False, False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(calls, [True, False, True, False]))
    assert switches() == before


def test_a_measure_is_never_rounded():
    with exact():
        with products_of_fp32(tf32=True):
            assert switches() == (False, False)
        assert not torch.backends.cudnn.enabled
    with products_of_fp32(tf32=True):
        assert switches() == (True, True)


def region_of(precision="model"):
    net = vt.Network()
    net.output("y", net.relu(net.input("x", (4, 3000)) @ rand(3000, 8) + rand(8, seed=1)))
    model = optimize(net, precision)
    return RegionView(next(iter(model.graph)), stored_weights(model.graph))


def test_the_measure_of_fp32_is_computed_in_fp64():
    region, x = region_of(), torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    reference = DeviceReference().bind(region, {}).run
    weight, bias = (region.constant(v).double() for v in region.formal if region.is_constant(v))
    want = torch.relu(x.double() @ weight + bias).float()
    with exact():
        assert torch.equal(reference(x), want)
    assert reference(x).dtype == torch.float32


def test_tf32_is_part_of_the_problem_and_of_its_tolerance():
    plain, rounded = region_of(), region_of("tf32")
    assert rounded.tf32
    assert not plain.tf32
    assert plain.signature() != rounded.signature()
    assert region_ulps(plain) == 72.0
    assert region_ulps(rounded) == 72.0 + 4 * 2**13


def test_weights_in_parts_lose_nothing():
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 30)
    weight[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    high, low = stored(weight, FP32).split(50)
    torch.testing.assert_close(high + low, weight, rtol=0, atol=0, equal_nan=True)
    finite = weight.isfinite()
    assert not (high.view(torch.int32)[finite] & 0x1FFF).any()
    assert (low[finite].abs() <= high[finite].abs() * 2**-10).all()
    assert torch.equal(low[0, :2], torch.zeros(2))


def test_weights_for_tf32_are_the_nearest():
    weight = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 + 2**-20, 3.4028235e38, float("inf"), float("nan")])
    got = stored(weight, TF32)
    assert got[:5].tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 3.4028234663852886e38, float("inf")]
    assert got[5].isnan()
    half = weight.half()
    assert stored(half, Element(DT.FLOAT16)) is half
