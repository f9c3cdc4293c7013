"""RMS normalization with the residual addition, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, heads, row_stride, head_stride, size, eps, offset,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = s * rsqrt(mean(s^2) + eps) * (weight + offset), s = x + residual; s goes back to residual.

    Row r of x lies at (r // heads) * row_stride + (r % heads) * head_stride; out and residual are contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = (row // heads) * row_stride + (row % heads) * head_stride
    value = tl.load(x + base + columns, mask=inside, other=0.0)
    s = value.to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(value.dtype)
        tl.store(residual + row * size + columns, rounded, mask=inside)
        s = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 0) / size + eps)
    tl.store(out + row * size + columns, (s * scale * w).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """x: [rows, size] or [tokens, heads, size], last dimension contiguous; residual: contiguous, updated in place."""
    size = x.shape[-1]
    heads, head_stride = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    rows = x.numel() // size
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else residual
    if rows:
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(rows,)](
            x, total, weight, out, heads, x.stride(0), head_stride, size, eps, offset,
            RESIDUAL=residual is not None, BLOCK=block, num_warps=max(1, min(8, block // 512)), **options(x),
        )  # fmt: skip
    return out, total


@triton.jit
def rms_norm_fp8_kernel(x, weight, out, scales, size, x_row, eps, offset, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The normalized row in fp8, with the row's scale: max |y| / 448."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    s = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    y = s * tl.rsqrt(tl.sum(s * s, 0) / size + eps) * tl.where(inside, w, 0.0)
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
    packed = tl.minimum(tl.maximum(y / scale, -448.0), 448.0).to(tl.float8e4nv)
    tl.store(out + row * size + columns, packed, mask=inside)
    tl.store(scales + row, scale)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x: [rows, size] -> (float8_e4m3fn [rows, size], scales [rows] fp32) of the normalized rows."""
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    rms_norm_fp8_kernel[(rows,)](
        x, weight, out, scales, size, x.stride(0), eps, offset, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        **options(x),
    )  # fmt: skip
    return out, scales
