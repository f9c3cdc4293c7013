"""Type conversion, with ONNX's rules for narrow floats and sub-byte integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from venturi.core.errors import ModelError
from venturi.ir.dtypes import DT, FP8, finite_max, integer_range, numpy_dtype
from venturi.ops.table import POINTWISE, OpContext, op
from venturi.ops.tensors import STORAGE, logical_dtype, to_numpy, to_torch

T = torch.Tensor
_NARROW_FLOATS = {DT.FLOAT4E2M1, DT.FLOAT6E2M3, DT.FLOAT6E3M2}
_SUB_BYTE_INTS = {DT.INT4, DT.UINT4, DT.INT2, DT.UINT2}


def convert(x: Any, source: DT, target: DT, *, saturate: bool = True, round_mode: str = "up") -> Any:
    """Convert a stored value of logical type `source` to `target`. Source of the rules: ONNX operator Cast.

    `saturate` clamps overflow of fp8 targets to the largest finite value. `round_mode` steers float8e8m0 only.
    """
    if source == target:
        return x
    if source == DT.STRING:
        return _from_strings(x, target)
    if target == DT.STRING:
        return _to_strings(x, source)
    if target == DT.BOOL:
        return (x.float() if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x) != 0
    if target in FP8:
        return _to_fp8(x, target, saturate)
    if target == DT.FLOAT8E8M0:
        return _to_e8m0(x.float(), saturate, round_mode)
    if target in _NARROW_FLOATS:
        limit = finite_max(target)
        array = torch.clamp(x.float(), -limit, limit).cpu().numpy()
        return torch.from_numpy(array.astype(numpy_dtype(target)).astype(np.float32)).to(x.device)
    if target in _SUB_BYTE_INTS:
        return _to_sub_byte(x, target)
    return x.to(STORAGE[target])


def _to_fp8(x: T, target: DT, saturate: bool) -> Any:
    x = x.float()
    if not saturate:
        return to_torch(x.cpu().numpy().astype(numpy_dtype(target))).to(x.device)
    limit = finite_max(target)
    return torch.clamp(x, -limit, limit).to(STORAGE[target])


def _to_e8m0(x: T, saturate: bool, round_mode: str) -> T:
    """Exponent-only format: 2^(byte-127), NaN is 255. Negative inputs give NaN as in ml_dtypes."""
    mantissa, exponent = torch.frexp(x.abs())  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    code = exponent.to(torch.int32) - 1 + 127
    if round_mode == "up":
        code = code + (mantissa > 0.5).to(torch.int32)
    elif round_mode == "nearest":
        code = code + (mantissa >= 0.75).to(torch.int32)
    code = torch.where(x == 0, torch.zeros_like(code), code)
    overflow = torch.isinf(x) | (code > 254)
    code = torch.where(overflow, torch.full_like(code, 254 if saturate else 255), code.clamp(0, 254))
    code = torch.where(torch.isnan(x) | (x < 0), torch.full_like(code, 255), code)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_sub_byte(x: T, target: DT) -> T:
    """Floats round toward zero; what does not fit keeps its low bits."""
    low, high = integer_range(target)
    x = torch.nan_to_num(x.float(), nan=0.0) if x.dtype.is_floating_point else x
    bits = (high - low + 1).bit_length() - 1
    value = x.to(torch.int64) & ((1 << bits) - 1)
    if low < 0:
        value = torch.where(value > high, value - (1 << bits), value)
    return value.to(STORAGE[target])


def _from_strings(x: np.ndarray[Any, Any], target: DT) -> Any:
    try:
        floats = np.asarray(x, dtype=object).reshape(-1)
        if target in (DT.INT64, DT.INT32, DT.INT16, DT.INT8, DT.UINT8, DT.UINT16, DT.UINT32, DT.UINT64):
            array = np.array([int(float(s)) for s in floats], dtype=numpy_dtype(target))
        else:
            array = np.array([float(s) for s in floats], dtype=np.float64)
    except ValueError as exc:
        raise ModelError(f"Cast from string: {exc}") from exc
    out = to_torch(array.reshape(np.shape(x)))
    return convert(out, logical_dtype(out), target)


def _to_strings(x: T, source: DT) -> Any:
    array = to_numpy(x, source)
    if array.dtype.kind == "b":
        return np.vectorize(lambda v: "1" if v else "0", otypes=[object])(array)
    if array.dtype.kind not in "fc" and source not in (DT.BFLOAT16, *FP8, *_NARROW_FLOATS):
        return np.vectorize(str, otypes=[object])(array)

    def text(v: Any) -> str:
        f = float(v)
        return "NaN" if np.isnan(f) else str(v).replace("inf", "INF")

    return np.vectorize(text, otypes=[object])(array) if array.size else array.astype(object)


@op("Cast", POINTWISE, ulps=1.0)
def cast(x: Any, *, to: int, saturate: int = 1, round_mode: str = "up", ctx: OpContext) -> Any:
    source = (ctx.in_dtypes[0] if ctx.in_dtypes else None) or logical_dtype(x)
    return convert(x, source, DT(to), saturate=bool(saturate), round_mode=round_mode)


@op("CastLike", POINTWISE, ulps=1.0)
def cast_like(x: Any, like: Any, *, saturate: int = 1, round_mode: str = "up", ctx: OpContext) -> Any:
    source = ctx.in_dtypes[0] or logical_dtype(x)
    target = ctx.in_dtypes[1] or logical_dtype(like)
    return convert(x, source, target, saturate=bool(saturate), round_mode=round_mode)


@op("BitCast", ulps=0.0)
def bit_cast(x: T, *, to: int) -> Any:
    array = to_numpy(x).view(numpy_dtype(DT(to)))
    return to_torch(np.asarray(array).reshape(x.shape)).to(x.device)
