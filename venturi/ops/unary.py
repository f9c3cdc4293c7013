"""Unary pointwise operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from venturi.ops.table import POINTWISE, op

T = torch.Tensor


def _via(fn: Callable[[T], T], x: T) -> T:
    """Compute narrow floats and wide unsigned integers in a type torch handles, then come back."""
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return fn(x.to(torch.int64)).to(x.dtype)
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
        return fn(x.float()).to(x.dtype)
    return fn(x)


def _register(name: str, fn: Callable[[T], T], ulps: float = 8.0) -> None:
    op(name, POINTWISE, ulps=ulps)(lambda x, _fn=fn: _via(_fn, x))


for _name, _fn in {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Reciprocal": torch.reciprocal,
    "Sigmoid": torch.sigmoid,
}.items():
    _register(_name, _fn, ulps=16.0)


def _absolute(x: T) -> T:
    return torch.abs(x) if x.dtype.is_signed else x


_EXACT: dict[str, Callable[[T], T]] = {
    "Abs": _absolute,
    "Ceil": torch.ceil,
    "Floor": torch.floor,
    "Neg": torch.neg,
    "Round": torch.round,
    "Sign": torch.sign,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
}
for _name, _exact in _EXACT.items():
    _register(_name, _exact, ulps=0.0)


@op("Identity", POINTWISE, ulps=0.0)
def identity(x: object) -> object:
    return x


@op("IsNaN", POINTWISE, ulps=0.0)
def is_nan(x: T) -> T:
    return torch.isnan(x.float() if x.dtype.itemsize == 1 else x)


@op("IsInf", POINTWISE, ulps=0.0)
def is_inf(x: T, *, detect_negative: int = 1, detect_positive: int = 1) -> T:
    x = x.float() if x.dtype.itemsize == 1 else x
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | (x == -np.inf)
    if detect_positive:
        found = found | (x == np.inf)
    return found
