"""RMS normalization with the residual addition and quantization to fp8, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, scales, heads, row_stride, head_stride, size, eps, offset,
    RESIDUAL: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = y = s * rsqrt(mean(s^2) + eps) * (weight + offset), s = x + residual; s goes back to residual.

    Row r of x lies at (r // heads) * row_stride + (r % heads) * head_stride; out and residual are contiguous. With FP8
    out is y divided by the row's scale, max |y| / 448.
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
    y = s * tl.rsqrt(tl.sum(s * s, 0) / size + eps) * w
    if FP8:
        scale = tl.maximum(tl.max(tl.abs(tl.where(inside, y, 0.0)), 0), 1e-12) / 448.0
        y = tl.minimum(tl.maximum(y / scale, -448.0), 448.0)
        tl.store(scales + row, scale)
    tl.store(out + row * size + columns, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """x: [rows, size] or [tokens, heads, size], last dimension contiguous; residual: contiguous, updated in place."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, _launch(x, weight, eps, residual, offset, out, None)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [rows, size] -> (float8_e4m3fn [rows, size], scales [rows] fp32, sums) of the normalized rows."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    return out, scales, _launch(x, weight, eps, residual, offset, out, scales)


def _launch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor, scales: Tensor | None
) -> Tensor:
    """The sums: `residual`, or x where there is none."""
    size = x.shape[-1]
    heads, head_stride = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    rows = x.numel() // size
    total = x if residual is None else residual
    if rows:
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(rows,)](
            x, total, weight, out, out if scales is None else scales, heads, x.stride(0), head_stride, size, eps,
            offset, RESIDUAL=residual is not None, FP8=scales is not None, BLOCK=block,
            num_warps=max(1, min(8, block // 512)), **options(x),
        )  # fmt: skip
    return total
