"""Two convolutions in one kernel, on the device: every candidate, odd sizes, NaN, and runs back to back."""

from __future__ import annotations

import pytest
import torch

import venturi as vt
from tests.backends.cuda.pairs import branches_region, pair_region, quantized_pair
from tests.backends.cuda.test_early import weight
from tests.gpu.test_cuda_early import device  # noqa: F401
from venturi.backends.base import disagreement, region_slack, region_ulps
from venturi.backends.cuda.backend import exact
from venturi.backends.cuda.device import DeviceWeights
from venturi.backends.cuda.placement import OnDevice
from venturi.backends.cuda.tactics.back_to_back import BackToBack
from venturi.backends.cuda.tactics.branches import BranchesConv
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.core.errors import TuningError
from venturi.engine.pairing import Pairing

pytestmark = pytest.mark.gpu


def kernels(device, tactic, region):  # noqa: F811
    """(configuration, kernel) of every candidate; those that the compiler has too few registers for the tuner passes
    over too."""
    candidates = tactic.match(region)
    assert not isinstance(candidates, str), candidates
    place = torch.device("cuda", 0)
    region.weights = DeviceWeights(region.weights, place)
    device.store.compile(s for c in candidates for s in tactic.sources(region, c))
    found = []
    for config in candidates:
        try:
            found.append((config, OnDevice(tactic, place).bind(region, config).run))
        except TuningError as exc:
            assert "spills" in str(exc), exc
    assert found
    return found


def packed(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def same(a, b):
    return all(bool((x.eq(y) | (x.isnan() & y.isnan())).all()) for x, y in zip(a, b))


def check_halves(device, tactic, region, last):  # noqa: F811
    """Every candidate on ordinary and poisoned values (`last`: a pixel of the last image and channel), ten times bit
    for bit; gives the inputs and the kernels."""
    found = kernels(device, tactic, region)
    shapes = [tuple(v.shape) for v in region.dynamic]
    args = [torch.randn(shape, device="cuda").half().to(memory_format=torch.channels_last) for shape in shapes]
    poisoned = [x.clone(memory_format=torch.preserve_format) for x in args]
    for x in poisoned:
        x[0, 0, 0, 0], x[-1, -1, *last], x[1, 1, 1, 1] = float("nan"), float("inf"), float("nan")
    reference = DeviceReference().bind(region, {})
    with exact():
        want, want_poisoned = reference.run(*args), reference.run(*poisoned)
    for config, run in found:
        got = run(*args)
        assert disagreement(got, want, region_ulps(region)) is None, config
        assert disagreement(run(*poisoned), want_poisoned, region_ulps(region)) is None, config
        assert all(same(packed(run(*args)), packed(got)) for _ in range(10)), config
    return args, [run for _, run in found]


@pytest.mark.parametrize("depth, wide, narrow", [(64, 256, 64), (64, 256, 128), (128, 512, 128), (256, 1024, 256)])
@pytest.mark.parametrize("options", [{}, {"residual": False, "both": False}, {"skip": True}], ids=str)
def test_pairs(device, depth, wide, narrow, options):  # noqa: F811
    region = pair_region((33, 29, 31), depth, wide, narrow, **options)
    args, runs = check_halves(device, BackToBack(device), region, (-1, -1))
    for run in runs:
        empty = run(*(x[:0] for x in args))
        assert [y.shape[0] for y in packed(empty)] == [0] * len(region.outputs)


@pytest.mark.parametrize("depth, wide, narrow", [(64, 256, 64), (64, 256, 128), (128, 512, 128)])
@pytest.mark.parametrize("residual", [False, True])
def test_pairs_of_bytes(device, depth, wide, narrow, residual):  # noqa: F811
    region = quantized_pair((33, depth, 29, 31), wide, narrow, residual=residual)
    found = kernels(device, BackToBack(device), region)
    args = [torch.randint(-24, 25, list(v.shape), dtype=torch.int8, device="cuda") for v in region.dynamic]
    args = [x.contiguous(memory_format=torch.channels_last) for x in args]
    with exact():
        want = DeviceReference().bind(region, {}).run(*args)
    assert all(x.unique().numel() > 20 for x in want), "a test of few values"
    for config, run in found:
        got = run(*args)
        assert disagreement(got, want, region_ulps(region), slack=region_slack(region)) is None, config
        assert all(float((x != y).float().mean()) < 0.02 for x, y in zip(got, want)), config
        assert all(same(run(*args), got) for _ in range(10)), config


@pytest.mark.parametrize(
    "size, here, there, out, stride",
    [((33, 29, 31), 64, 64, 256, 1), ((64, 28, 28), 128, 256, 512, 2), ((65, 14, 15), 256, 512, 1000, 2)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"bias": False, "activation": False}], ids=str)
def test_branches(device, size, here, there, out, stride, options):  # noqa: F811
    region = branches_region(size, here, there, out, stride=stride, **options)
    check_halves(device, BranchesConv(device), region, (0, 0))


def test_an_engine_of_pairs(device, tmp_path, monkeypatch):  # noqa: F811
    """Joined by a made-up clock, it computes what the network says, from its file and from the timing cache too."""
    monkeypatch.setattr(Pairing, "_time", lambda self, plan, joined: 100.0 - len(joined))
    net = vt.Network()
    y = net.relu(net.conv(net.input("x", (64, 64, 56, 56)), weight(256, 64, 1, 1) * 0.1, weight(256)))
    for _ in range(2):
        z = net.relu(net.conv(y, weight(64, 256, 1, 1) * 0.05, weight(64)))
        z = net.relu(net.conv(z, weight(64, 64, 3, 3) * 0.05, weight(64), pads=[1] * 4))
        y = net.relu(net.conv(z, weight(256, 64, 1, 1) * 0.1, weight(256)) + y)
    net.output("y", y)
    engine = vt.build(net, device="cuda", precision="fp16", timing_cache=tmp_path / "t.json", refit=True)
    pairs = [s for s in engine.plan.steps if s.kind == "pair"]
    assert [s.tactic for s in pairs] == ["triton-conv-pair"] * 2
    given = torch.randn(64, 64, 56, 56)
    want = vt.build(net, device="cuda", precision="fp16", opt_level=0)(given)
    got = engine(given)
    assert float((got - want).norm() / want.norm()) < 1e-3
    engine.refit({})
    assert [s.kind for s in engine.plan.steps].count("pair") == 2
    assert torch.equal(engine(given), got)
    engine.save(tmp_path / "e.vt")
    assert torch.equal(vt.load(tmp_path / "e.vt")(given), got)
    options = {"device": "cuda", "precision": "fp16", "timing_cache": tmp_path / "t.json", "deterministic": True}
    again = vt.build(net, **options)
    assert [s.name for s in again.plan.steps] == [s.name for s in engine.plan.steps]
    assert [s.config for s in again.plan.steps] == [s.config for s in engine.plan.steps]
