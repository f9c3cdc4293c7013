"""Binary and variadic pointwise operators, with numpy broadcasting and ONNX's integer semantics."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from venturi.ops.table import POINTWISE, op

T = torch.Tensor
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _wrap(fn: Callable[..., T], *xs: T) -> T:
    """Modular integer arithmetic of wide unsigned types through int64's bits."""
    if xs[0].dtype in _UNSIGNED:
        return fn(*(x.to(torch.int64) for x in xs)).to(xs[0].dtype)
    return fn(*xs)


def _order(fn: Callable[..., T], np_fn: Callable[..., Any], a: T, b: T) -> T:
    """Order-dependent operations: uint64 does not fit int64, so numpy does it."""
    if a.dtype == torch.uint64:
        return torch.from_numpy(np.asarray(np_fn(a.cpu().numpy(), b.cpu().numpy()))).to(a.device)
    if a.dtype in _UNSIGNED:
        out = fn(a.to(torch.int64), b.to(torch.int64))
        return out if out.dtype == torch.bool else out.to(a.dtype)
    return fn(a, b)


@op("Add", POINTWISE)
def add(a: T, b: T) -> T:
    return _wrap(torch.add, a, b)


@op("Sub", POINTWISE)
def sub(a: T, b: T) -> T:
    return _wrap(torch.sub, a, b)


@op("Mul", POINTWISE)
def mul(a: T, b: T) -> T:
    return _wrap(torch.mul, a, b)


@op("Div", POINTWISE)
def div(a: T, b: T) -> T:
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return a / b
    return _order(lambda x, y: torch.div(x, y, rounding_mode="trunc"), np.floor_divide, a, b)


@op("Mod", POINTWISE)
def mod(a: T, b: T, *, fmod: int = 0) -> T:
    if fmod:
        return _order(torch.fmod, np.fmod, a, b)
    return _order(torch.remainder, np.mod, a, b)


@op("Pow", POINTWISE, ulps=32)
def pow_(a: T, b: T) -> T:
    if a.dtype in _UNSIGNED or b.dtype in _UNSIGNED:
        return torch.pow(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    if not a.dtype.is_floating_point and b.dtype.is_floating_point:
        return torch.pow(a.double(), b.double()).to(a.dtype)
    if not a.dtype.is_floating_point and not b.dtype.is_floating_point and bool((b < 0).any()):
        return torch.pow(a.double(), b.double()).to(a.dtype)
    return torch.pow(a, b.to(a.dtype)) if b.dtype != a.dtype else torch.pow(a, b)


def _compare(name: str, fn: Callable[..., T], np_fn: Callable[..., Any]) -> None:
    op(name, POINTWISE, ulps=0.0)(lambda a, b: _order(fn, np_fn, a, b))


_compare("Less", torch.lt, np.less)
_compare("LessOrEqual", torch.le, np.less_equal)
_compare("Greater", torch.gt, np.greater)
_compare("GreaterOrEqual", torch.ge, np.greater_equal)


@op("Equal", POINTWISE, ulps=0.0)
def equal(a: Any, b: Any) -> T:
    if isinstance(a, np.ndarray):
        return torch.from_numpy(np.asarray(a == b, dtype=bool))
    return _order(torch.eq, np.equal, a, b)


for _name, _fn in {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}.items():
    op(_name, POINTWISE, ulps=0.0)(lambda a, b, _fn=_fn: _wrap(_fn, a, b))


@op("BitShift", POINTWISE, ulps=0.0)
def bit_shift(a: T, b: T, *, direction: str) -> T:
    """Shifts in numpy: torch has none for wide unsigned types.

    A shift outside 0..width-1 moves every bit out: what is left is 0, or the sign when shifting right.
    """
    x, y = np.broadcast_arrays(a.cpu().numpy(), b.cpu().numpy())
    width = x.dtype.itemsize * 8
    shifted = np.left_shift(x, y % width) if direction == "LEFT" else np.right_shift(x, y % width)
    overflow = np.where(x < 0, -1, 0).astype(x.dtype) if direction == "RIGHT" else np.zeros_like(x)
    return torch.from_numpy(np.asarray(np.where((y >= width) | (y < 0), overflow, shifted))).to(a.device)


@op("Max", POINTWISE, ulps=0.0)
def max_(*xs: T) -> T:
    return reduce(lambda a, b: _order(torch.maximum, np.maximum, a, b), xs)


@op("Min", POINTWISE, ulps=0.0)
def min_(*xs: T) -> T:
    return reduce(lambda a, b: _order(torch.minimum, np.minimum, a, b), xs)


@op("Sum", POINTWISE)
def sum_(*xs: T) -> T:
    return reduce(torch.add, xs)


@op("Mean", POINTWISE)
def mean_(*xs: T) -> T:
    return reduce(torch.add, xs) / len(xs)


@op("Where", POINTWISE, ulps=0.0)
def where(condition: T, a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray):
        return np.where(condition.numpy(), a, b)
    if a.dtype in _UNSIGNED:
        return torch.where(condition, a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return torch.where(condition, a, b)
