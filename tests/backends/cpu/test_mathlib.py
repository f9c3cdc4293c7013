"""Vector mathematics against fp64: 2 ulp (sigmoid and log1p 3, expm1 4) over the whole range, and the special values."""

from __future__ import annotations

import math

import pytest
import torch

from tests.backends.cpu.harness import isas, unary
from venturi.backends.cpu.codegen import mathlib as m

CASES = {
    "exp": (m.exp, torch.exp, (-87.0, 88.5)),
    "sigmoid": (m.sigmoid, torch.sigmoid, (-80.0, 80.0)),
    "tanh": (m.tanh, torch.tanh, (-12.0, 12.0)),
    "erf": (m.erf, torch.erf, (-5.0, 5.0)),
    "log": (m.log, torch.log, (1e-30, 1e6)),
    "expm1": (m.expm1, torch.expm1, (-20.0, 20.0)),
    "log1p": (m.log1p, torch.log1p, (0.0, 1.0)),
}
BOUNDS = {"sigmoid": 3.0, "log1p": 3.0, "expm1": 4.0}
SPECIAL = [
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1.1754944e-38,
    3.4e38,
    -3.4e38,
    88.8,
    -103.9,
    1.0,
    -1.0,
    0.625,
    4.0,
]


@pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
@pytest.mark.parametrize("name", CASES)
def test_within_a_few_ulp(name: str, isa) -> None:
    fn, reference, (low, high) = CASES[name]
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1 << 18, generator=g, dtype=torch.float64) * (high - low) + low
    small = torch.exp(torch.rand(1 << 18, generator=g, dtype=torch.float64) * 30 - 30)
    x = torch.cat([x, small, -small if low < 0 else small]).float()
    want = reference(x.double())
    ulp = torch.abs(torch.nextafter(want.float().abs(), torch.tensor(math.inf)) - want.float().abs()).double()
    error = ((unary(isa, fn, x).double() - want).abs() / ulp).max()
    assert error <= BOUNDS.get(name, 2.0), f"{name}: {float(error):.2f} ulp"


@pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
@pytest.mark.parametrize("name", CASES)
def test_special_values(name: str, isa) -> None:
    fn, reference, _ = CASES[name]
    x = torch.tensor([v for v in SPECIAL if name != "log1p" or not (v < 0 or v == math.inf)])
    x = torch.cat([x, torch.ones(-len(x) % isa.lanes)])
    got, want = unary(isa, fn, x), reference(x.double()).float()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-44, equal_nan=True)
    if name in ("tanh", "erf"):
        assert torch.equal(torch.signbit(got)[3:5], torch.signbit(want)[3:5])
