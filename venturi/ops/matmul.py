"""Matrix products and linear algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from venturi.ops.table import CONTRACT, CONTRIB, Shapes, op

T = torch.Tensor


def _matmul_flops(ins: Shapes, outs: Shapes, attrs: dict[str, Any]) -> float:
    depth = ins[0][-1] if ins[0] else 1
    return 2.0 * float(np.prod(outs[0], dtype=np.float64)) * depth


def _gemm_flops(ins: Shapes, outs: Shapes, attrs: dict[str, Any]) -> float:
    depth = ins[0][0] if attrs.get("transA") else ins[0][1]
    return 2.0 * float(np.prod(outs[0], dtype=np.float64)) * depth


@op("MatMul", CONTRACT, ulps=64, flops=_matmul_flops)
def matmul(a: T, b: T) -> T:
    if a.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.matmul(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return torch.matmul(a, b)


@op("Gemm", CONTRACT, ulps=64, flops=_gemm_flops)
def gemm(
    a: T, b: T, c: T | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> T:
    a = a.T if transA else a
    b = b.T if transB else b
    if c is not None and alpha == 1.0 and beta == 1.0 and a.dtype.is_floating_point:
        return torch.addmm(c.expand(a.shape[0], b.shape[1]) if c.dim() != 1 else c, a, b)
    y = torch.matmul(a, b)
    y = (y * alpha).to(a.dtype) if alpha != 1.0 else y
    return y if c is None else (y + (c * beta).to(a.dtype) if beta != 1.0 else y + c)


@op("FusedMatMul", CONTRACT, domain=CONTRIB, ulps=64, flops=_matmul_flops)
def fused_matmul(
    a: T,
    b: T,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> T:
    a = a.movedim(0, -2) if transBatchA else a
    b = b.movedim(0, -2) if transBatchB else b
    y = torch.matmul(a.mT if transA else a, b.mT if transB else b)
    return y * alpha if alpha != 1.0 else y


@op("MatMulInteger", CONTRACT, ulps=0.0, flops=_matmul_flops)
def matmul_integer(a: T, b: T, a_zero: T | None = None, b_zero: T | None = None) -> T:
    x, y = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        x = x - (a_zero[:, None] if a_zero.dim() == 1 and a_zero.numel() > 1 else a_zero).to(torch.int32)
    if b_zero is not None:
        y = y - b_zero.to(torch.int32)
    return torch.matmul(x, y)


@op("Einsum", CONTRACT, ulps=64)
def einsum(*xs: T, equation: str) -> T:
    wide = [x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x for x in xs]
    y: T = torch.einsum(equation.replace(" ", ""), *wide)
    return y.to(xs[0].dtype)


@op("Det", ulps=64)
def det(x: T) -> T:
    y: T = torch.linalg.det(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
    return y.to(x.dtype)
