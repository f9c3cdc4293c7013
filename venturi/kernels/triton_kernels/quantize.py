"""Rows to fp8 with one scale a row, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options


@triton.jit
def quantize_rows_kernel(x, out, scales, size, x_row, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Two passes over the row: the largest magnitude, then x / scale."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    largest = tl.zeros([BLOCK], tl.float32)
    for at in range(0, size, BLOCK):
        column = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + column, mask=column < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.maximum(tl.max(largest, 0), 1e-12) / 448.0
    for at in range(0, size, BLOCK):
        column = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + column, mask=column < size, other=0.0).to(tl.float32) / scale
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
        tl.store(out + row * size + column, value.to(tl.float8e4nv), mask=column < size)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `venturi.kernels.quantize.quantize_rows`; features of a row are contiguous."""
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = min(8192, triton.next_power_of_2(size))
        quantize_rows_kernel[(rows,)](
            x, out, scales, size, x.stride(0), BLOCK=block, num_warps=max(1, min(8, block // 512)), **options(x)
        )
    return out, scales
