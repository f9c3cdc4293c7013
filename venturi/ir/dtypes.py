"""Data types: ONNX's enumeration, numpy's, safetensors' names. No torch here; ops/tensors.py maps to torch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

DT = ir.DataType

SUB_BYTE = frozenset({DT.INT4, DT.UINT4, DT.INT2, DT.UINT2, DT.FLOAT4E2M1, DT.FLOAT6E2M3, DT.FLOAT6E3M2})
FLOATS = frozenset({DT.FLOAT, DT.FLOAT16, DT.BFLOAT16, DT.DOUBLE})
FP8 = frozenset({DT.FLOAT8E4M3FN, DT.FLOAT8E4M3FNUZ, DT.FLOAT8E5M2, DT.FLOAT8E5M2FNUZ})
SIGNED_INTS = frozenset({DT.INT8, DT.INT16, DT.INT32, DT.INT64})
UNSIGNED_INTS = frozenset({DT.UINT8, DT.UINT16, DT.UINT32, DT.UINT64})
INTS = SIGNED_INTS | UNSIGNED_INTS

_PRECISION = {"fp32": DT.FLOAT, "fp16": DT.FLOAT16, "bf16": DT.BFLOAT16}


def precision_dtype(name: str) -> DT:
    """fp32, fp16 or bf16 → the data type."""
    return _PRECISION[name]


_NAMES = {DT.FLOAT: "float32", DT.DOUBLE: "float64"}
_BY_NAME = {_NAMES.get(d, d.name.lower()): d for d in DT}


def dtype_name(dtype: DT | None) -> str:
    """numpy-style name: float32, bfloat16, int64, string, undefined."""
    return "undefined" if dtype is None else _NAMES.get(dtype, dtype.name.lower())


def dtype_from_name(name: str) -> DT | None:
    """The inverse of dtype_name; None for names that are no type."""
    return _BY_NAME.get(name)


def dtype_names() -> list[str]:
    return list(_BY_NAME)


def numpy_dtype(dtype: DT) -> np.dtype[np.generic]:
    """numpy dtype (ml_dtypes for the narrow ones); strings are object arrays."""
    if dtype == DT.STRING:
        return np.dtype(object)
    return np.dtype(dtype.numpy())


def short_name(dtype: DT | None) -> str:
    """fp32-style names for tables."""
    if dtype is None:
        return "?"
    return str(dtype.short_name())


def integer_range(dtype: DT) -> tuple[int, int]:
    """Smallest and largest value of an integer type, sub-byte ones included."""
    if dtype in (DT.INT4, DT.UINT4, DT.INT2, DT.UINT2):
        bits = 4 if dtype in (DT.INT4, DT.UINT4) else 2
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype in (DT.INT4, DT.INT2) else (0, (1 << bits) - 1)
    info = np.iinfo(dtype.numpy())
    return int(info.min), int(info.max)


def finite_max(dtype: DT) -> float:
    """Largest finite value of a floating type."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)
