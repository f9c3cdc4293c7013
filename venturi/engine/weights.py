"""Weights as a safetensors file: written from tensors, read back as views of a memory map."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from venturi.core.errors import EngineError

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}
_ALIGN = 64
MAX_HEADER_BYTES = 100 << 20


def can_store(array: np.ndarray[Any, Any]) -> bool:
    """Types safetensors has no code for stay inside graph.onnx."""
    return array.dtype.name in _CODES


def layout(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(header with its length prefix, name → (begin, end) in the data part). Tensors start at multiples of 64 bytes."""
    header: dict[str, Any] = {}
    spans, at = {}, 0
    for name, array in arrays.items():
        if pad := -at % _ALIGN:
            header[f"__pad__{at}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [at, at + pad]}
            at += pad
        spans[name] = (at, at + array.nbytes)
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": list(spans[name]),
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return struct.pack("<Q", len(text)) + text, spans


def write(arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[bytes | memoryview]:
    """The file as chunks, without joining the weights into one copy."""
    header, _ = layout(arrays)
    chunks: list[bytes | memoryview] = [header]
    at = 0
    for array in arrays.values():
        if pad := -at % _ALIGN:
            chunks.append(b"\0" * pad)
            at += pad
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        chunks.append(memoryview(flat))  # type: ignore[arg-type]
        at += array.nbytes
    return chunks


def read(data: memoryview) -> dict[str, np.ndarray[Any, Any]]:
    """Views into `data` by name. Raises EngineError when the header lies about types, shapes or spans."""
    import ml_dtypes  # noqa: F401

    if len(data) < 8:
        raise EngineError("the weights are truncated")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise EngineError(f"the weights' header claims {size} bytes of {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
        body = data[8 + size :]
        return {n: _view(body, n, e) for n, e in header.items() if not n.startswith("__")}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(f"the weights' header is damaged: {exc}") from exc


def _view(body: memoryview, name: str, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(_NAMES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    shape = [int(d) for d in entry["shape"]]
    count = int(np.prod(shape, dtype=np.int64))
    if not 0 <= begin <= end <= len(body) or end - begin != count * dtype.itemsize or min(shape, default=0) < 0:
        raise EngineError(f"weight {name!r}: {entry} does not fit the {len(body)} bytes of weights")
    return np.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
