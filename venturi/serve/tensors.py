"""Tensor types of the protocol and their bytes: little-endian rows; strings as a length and the bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from venturi.serve.errors import invalid

Array = np.ndarray[Any, Any]

BYTES = "BYTES"
# Protocol name -> numpy type; BYTES are object arrays of bytes.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{n}": np.dtype(f"<u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"INT{n}": np.dtype(f"<i{n // 8}") for n in (8, 16, 32, 64)},
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    BYTES: np.dtype(object),
}
ENGINE_TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "bfloat16": "BF16", "string": BYTES,
}  # fmt: skip


def count_elements(shape: Sequence[int]) -> int:
    total = 1
    for d in shape:
        total *= d
    return total


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """A view on `data` where the type allows. Raises ServeError when the size is not what type and shape say."""
    count = count_elements(shape)
    if datatype == BYTES:
        return _strings(name, data, count).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise invalid(
            f"unexpected size for input '{name}': got {len(data)} bytes, expecting {count * dtype.itemsize} bytes"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _strings(name: str, data: bytes | memoryview, count: int) -> Array:
    view, at = memoryview(data), 0
    found: list[bytes] = []
    while at < len(view):
        if at + 4 > len(view):
            raise invalid(f"incomplete string length indicator for input '{name}' at byte {at}")
        (length,) = struct.unpack_from("<I", view, at)
        at += 4
        if at + length > len(view):
            raise invalid(f"incomplete string data for input '{name}': element {len(found)} wants {length} bytes")
        found.append(bytes(view[at : at + length]))
        at += length
    if len(found) != count:
        raise invalid(f"unexpected number of string elements {len(found)} for input '{name}', expecting {count}")
    out = np.empty(count, dtype=object)
    out[:] = found
    return out


def wire_view(array: Array, datatype: str) -> memoryview:
    """The array's bytes as the wire has them, copied only where they lie otherwise."""
    if datatype == BYTES:
        return memoryview(to_bytes(array, datatype))
    return np.ascontiguousarray(array, dtype=DATATYPES[datatype]).reshape(-1).view(np.uint8).data


def to_bytes(array: Array, datatype: str) -> bytes:
    """The array's bytes as the wire has them."""
    if datatype == BYTES:
        return b"".join(struct.pack("<I", len(b)) + b for b in (as_bytes(v) for v in array.reshape(-1)))
    return np.ascontiguousarray(array, dtype=DATATYPES[datatype]).tobytes()


def as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def from_numbers(name: str, datatype: str, shape: Sequence[int], data: object) -> Array:
    """From a JSON value: nested lists or a flat one, of what the type says; out-of-range numbers are refused."""
    flat: list[Any] = []
    _flatten(data, flat)
    count = count_elements(shape)
    if len(flat) != count:
        raise invalid(f"unexpected number of elements {len(flat)} for input '{name}', expecting {count}")
    dtype = DATATYPES[datatype]
    if datatype == BYTES:
        if not all(isinstance(v, str) for v in flat):
            raise invalid(f"input '{name}' is BYTES: its data must be strings")
        out = np.empty(count, dtype=object)
        out[:] = [v.encode() for v in flat]
        return out.reshape(shape)
    wanted = bool if datatype == "BOOL" else int if dtype.kind in "iu" else (int, float)
    if not all(isinstance(v, wanted) and (datatype == "BOOL" or not isinstance(v, bool)) for v in flat):
        raise invalid(f"input '{name}' is {datatype}: unable to parse its data as such")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=dtype if dtype.kind in "biu" else np.float64).astype(dtype)
    except (OverflowError, ValueError) as exc:
        raise invalid(f"input '{name}' is {datatype}: a number does not fit: {exc}") from exc
    return array.reshape(shape)


def _flatten(data: object, out: list[Any]) -> None:
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        else:
            out.append(item)


def to_numbers(array: Array, datatype: str) -> list[Any]:
    """A flat JSON list."""
    flat = array.reshape(-1)
    if datatype == BYTES:
        return [as_bytes(v).decode("utf-8", "replace") for v in flat]
    if datatype in ("FP16", "BF16"):
        flat = flat.astype(np.float32)
    return list(flat.tolist())
