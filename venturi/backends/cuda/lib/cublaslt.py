"""cuBLASLt through ctypes: enumerate algorithms of a product, freeze one as 64 bytes, run it on torch's stream.

Row-major D[M, N] = epilogue(X[M, K] W[N, K]^T + C) is computed as the column-major D^T = W X^T.
"""

from __future__ import annotations

import ctypes as C
import functools
from dataclasses import dataclass
from typing import Any

import torch

from venturi.core.errors import DeviceError, TuningError

T = torch.Tensor
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_32F, _COMPUTE_TF32, _SCALE_32F = 68, 77, 0
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 4, 7, 8, 26
EPILOGUES = {
    (False, ""): 1, (False, "relu"): 2, (True, ""): 4, (True, "relu"): 6, (False, "gelu"): 32, (True, "gelu"): 36,
}  # fmt: skip
MAX_WORKSPACE = 32 << 20


class _Heuristic(C.Structure):
    _fields_ = [
        ("algo", C.c_uint64 * 8), ("workspace", C.c_size_t), ("state", C.c_int), ("waves", C.c_float),
        ("reserved", C.c_int * 4),
    ]  # fmt: skip


class _Library:
    def __init__(self) -> None:
        torch.cuda.current_blas_handle()
        self.lib = C.CDLL("libcublasLt.so.13" if (torch.version.cuda or "").startswith("13") else "libcublasLt.so.12")
        self.handle = C.c_void_p()
        self.call("cublasLtCreate", C.byref(self.handle))

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.lib, name)(*args)
        if status:
            raise DeviceError(f"{name} failed with status {status}")


@functools.cache
def library() -> _Library | None:
    """None when there is no GPU or no library."""
    if not torch.cuda.is_available():
        return None
    try:
        return _Library()
    except (OSError, DeviceError):
        return None


@dataclass(frozen=True)
class LtProblem:
    """`activation` is "", "relu" or "gelu" (tanh form), applied last; `residual` adds a matrix of D's shape. `tf32`:
    operands of fp32 may be rounded to it."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    residual: bool
    activation: str
    tf32: bool = False


class LtProduct:
    """Descriptors of a problem. Thread-safe once made; `bias` (a device vector) is kept by reference."""

    def __init__(self, problem: LtProblem, bias: T | None) -> None:
        found = library()
        if found is None:
            raise TuningError("cuBLASLt is not available")
        self._lt, self.problem, self._bias = found, problem, bias
        kind = _TYPES[problem.dtype]
        self._desc = C.c_void_p()
        compute = _COMPUTE_TF32 if kind == _TYPES[torch.float32] and problem.tf32 else _COMPUTE_32F
        found.call("cublasLtMatmulDescCreate", C.byref(self._desc), compute, _SCALE_32F)
        self._set(_TRANSA, C.c_int32(1))
        self._set(_TRANSB, C.c_int32(0))
        self._set(_EPILOGUE, C.c_int32(EPILOGUES[problem.bias, problem.activation]))
        if problem.bias:
            self._set(_BIAS_TYPE, C.c_int32(kind))
            if bias is not None:
                self._set(_BIAS_POINTER, C.c_void_p(bias.data_ptr()))
        self._a = self._layout(kind, problem.k, problem.n, problem.k)
        self._b = self._layout(kind, problem.k, problem.m, problem.k)
        self._d = self._layout(kind, problem.n, problem.m, problem.n)
        self._alpha, self._beta = C.c_float(1.0), C.c_float(1.0 if problem.residual else 0.0)

    def _set(self, attribute: int, value: Any) -> None:
        size = C.c_size_t(C.sizeof(value))
        self._lt.call("cublasLtMatmulDescSetAttribute", self._desc, attribute, C.byref(value), size)

    def _layout(self, kind: int, rows: int, columns: int, stride: int) -> C.c_void_p:
        made = C.c_void_p()
        sizes = (C.c_uint64(rows), C.c_uint64(columns), C.c_int64(stride))
        self._lt.call("cublasLtMatrixLayoutCreate", C.byref(made), kind, *sizes)
        return made

    def algorithms(self, limit: int) -> list[tuple[str, int]]:
        """(frozen algorithm as hex, workspace bytes), the library's favourite first."""
        preference = C.c_void_p()
        self._lt.call("cublasLtMatmulPreferenceCreate", C.byref(preference))
        size = C.c_size_t(MAX_WORKSPACE)
        self._lt.call("cublasLtMatmulPreferenceSetAttribute", preference, 1, C.byref(size), C.c_size_t(8))
        found, count = (_Heuristic * limit)(), C.c_int()
        status = self._lt.lib.cublasLtMatmulAlgoGetHeuristic(
            self._lt.handle, self._desc, self._a, self._b, self._d, self._d, preference, limit, found, C.byref(count)
        )
        self._lt.call("cublasLtMatmulPreferenceDestroy", preference)
        if status:
            return []
        return [(bytes(h.algo).hex(), int(h.workspace)) for h in found[: count.value] if h.state == 0]

    def workspace_of(self, algorithm: str) -> int | None:
        """Bytes a frozen algorithm needs, or None when this library does not run it."""
        result, algo = _Heuristic(), (C.c_uint64 * 8).from_buffer_copy(bytes.fromhex(algorithm))
        status = self._lt.lib.cublasLtMatmulAlgoCheck(
            self._lt.handle, self._desc, self._a, self._b, self._d, self._d, algo, C.byref(result)
        )
        return None if status or result.state else int(result.workspace)

    def run(self, algorithm: Any, workspace: int, x: T, weight: T, residual: T | None, out: T) -> None:
        """`algorithm` as `frozen` makes it."""
        work = torch.empty(max(workspace, 16), dtype=torch.uint8, device=x.device)
        c = out if residual is None else residual
        status = self._lt.lib.cublasLtMatmul(
            self._lt.handle, self._desc, C.byref(self._alpha), C.c_void_p(weight.data_ptr()), self._a,
            C.c_void_p(x.data_ptr()), self._b, C.byref(self._beta), C.c_void_p(c.data_ptr()), self._d,
            C.c_void_p(out.data_ptr()), self._d, algorithm, C.c_void_p(work.data_ptr()), C.c_size_t(workspace),
            C.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        if status:
            raise DeviceError(f"cublasLtMatmul failed with status {status} on {self.problem}")


def frozen(algorithm: str) -> Any:
    return (C.c_uint64 * 8).from_buffer_copy(bytes.fromhex(algorithm))
