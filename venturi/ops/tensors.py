"""How logical ONNX types are stored in torch, and the exact crossing between numpy and torch.

Types torch cannot compute with are held unpacked in a wider one: int4/int2 in int8, uint4/uint2 in uint8,
float4/float6 in float32. The logical type comes from the graph, never from the tensor.
"""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and friends with numpy)
import numpy as np
import torch

from venturi.core.errors import ShapeError
from venturi.ir.dtypes import DT, numpy_dtype

STORAGE: dict[DT, torch.dtype] = {
    DT.FLOAT: torch.float32,
    DT.DOUBLE: torch.float64,
    DT.FLOAT16: torch.float16,
    DT.BFLOAT16: torch.bfloat16,
    DT.INT8: torch.int8,
    DT.INT16: torch.int16,
    DT.INT32: torch.int32,
    DT.INT64: torch.int64,
    DT.UINT8: torch.uint8,
    DT.UINT16: torch.uint16,
    DT.UINT32: torch.uint32,
    DT.UINT64: torch.uint64,
    DT.BOOL: torch.bool,
    DT.COMPLEX64: torch.complex64,
    DT.COMPLEX128: torch.complex128,
    DT.FLOAT8E4M3FN: torch.float8_e4m3fn,
    DT.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    DT.FLOAT8E5M2: torch.float8_e5m2,
    DT.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    DT.FLOAT8E8M0: torch.float8_e8m0fnu,
    DT.INT4: torch.int8,
    DT.INT2: torch.int8,
    DT.UINT4: torch.uint8,
    DT.UINT2: torch.uint8,
    DT.FLOAT4E2M1: torch.float32,
    DT.FLOAT6E2M3: torch.float32,
    DT.FLOAT6E3M2: torch.float32,
}
_EXACT = {DT.INT4, DT.INT2, DT.UINT4, DT.UINT2, DT.FLOAT4E2M1, DT.FLOAT6E2M3, DT.FLOAT6E3M2}
_LOGICAL = {storage: dt for dt, storage in STORAGE.items() if dt not in _EXACT}
_BITS = {torch.bfloat16: torch.int16} | dict.fromkeys(
    (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.uint8,
)


def logical_dtype(x: Any) -> DT:
    """The ONNX type that a stored value has when nothing else is known."""
    return DT.STRING if isinstance(x, np.ndarray) else _LOGICAL[x.dtype]


def to_torch(array: np.ndarray[Any, Any], dtype: DT | None = None) -> Any:
    """numpy (ml_dtypes included) → stored tensor, sharing memory where the bits agree.

    Strings stay numpy object arrays. Read-only arrays are shared too: nothing writes to an input.
    """
    if array.dtype.kind in "OUST" or (dtype == DT.STRING and not array.size):
        return as_text(array)  # numpy takes an empty list of strings for floats
    logical = dtype or DT.from_numpy(array.dtype)
    if logical in _EXACT:
        return torch.from_numpy(array.astype(np.float32 if "FLOAT" in logical.name else np.int8)).to(STORAGE[logical])
    storage = STORAGE[logical]
    if not array.flags.c_contiguous and any(s < 0 for s in array.strides):
        array = array.copy()
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if storage in _BITS:
        bits = array.view(np.int16 if storage == torch.bfloat16 else np.uint8)
        return torch.from_numpy(bits).view(storage)
    return torch.from_numpy(array)


def as_text(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An object array of str: bytes are decoded as UTF-8."""
    flat = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.reshape(-1)]
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(array.shape)


def _hear_about_read_only_memory() -> None:
    """torch warns once in a process that it cannot keep memory read-only; here that is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(np.frombuffer(bytes(4), np.float32))


_hear_about_read_only_memory()


def to_numpy(value: Any, dtype: DT | None = None) -> Any:
    """Stored value → numpy of its logical type; sequences become lists, None stays None."""
    if value is None or isinstance(value, np.ndarray | dict):
        return value
    if isinstance(value, list | tuple):
        return [to_numpy(v, dtype) for v in value]
    if not isinstance(value, torch.Tensor):
        raise ShapeError(f"expected a tensor, got {type(value).__name__}")
    x = value.detach().cpu() if value.requires_grad or not value.is_cpu else value
    logical = dtype or _LOGICAL[x.dtype]
    if x.dtype in _BITS:
        return x.contiguous().view(_BITS[x.dtype]).numpy().view(numpy_dtype(_LOGICAL[x.dtype]))
    array = x.resolve_conj().numpy()
    return array.astype(numpy_dtype(logical)) if logical in _EXACT else array


def is_float(x: torch.Tensor) -> bool:
    return x.dtype.is_floating_point


def widen(x: torch.Tensor) -> torch.Tensor:
    """A type in which torch computes without loss of meaning: half kinds → fp32, unsigned → int64."""
    if x.dtype in (torch.float16, torch.bfloat16) or x.dtype in _BITS:
        return x.float()
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return x.to(torch.int64)
    return x
