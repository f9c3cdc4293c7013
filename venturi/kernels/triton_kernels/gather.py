"""Blocks of the paged cache copied into rows, one sequence after another, in the type of the products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options


@triton.jit
def gather_kernel(
    k_cache, v_cache, k_rows, v_rows, blocks, k_slot, v_slot, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, ROWS of its tokens): WIDTH contiguous numbers a token, of keys and of values."""
    place = tl.program_id(0).to(tl.int64)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.load(blocks + place).to(tl.int64)
    inside = (row < SIZE) & (column < WIDTH)
    to = (place * SIZE + row) * WIDTH + column
    keys = tl.load(k_cache + (block * SIZE + row) * k_slot + column, mask=inside, other=0.0)
    values = tl.load(v_cache + (block * SIZE + row) * v_slot + column, mask=inside, other=0.0)
    tl.store(k_rows + to, keys.to(k_rows.dtype.element_ty), mask=inside)
    tl.store(v_rows + to, values.to(v_rows.dtype.element_ty), mask=inside)


def gather(k_cache: Tensor, v_cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of `blocks` ([n] int32) as two [n * block_tokens, kv_heads, width] tensors of `dtype`."""
    _, size, heads, width = k_cache.shape
    k_rows, v_rows = (torch.empty(len(blocks) * size, heads, width, dtype=dtype, device=k_cache.device) for _ in "kv")
    columns = triton.next_power_of_2(heads * width)
    rows = max(1, min(size, 8192 // columns))
    gather_kernel[(len(blocks), triton.cdiv(size, rows))](
        k_cache, v_cache, k_rows, v_rows, blocks, k_cache.stride(1), v_cache.stride(1), WIDTH=heads * width,
        SIZE=size, ROWS=rows, COLUMNS=columns, num_warps=4, **options(k_cache),
    )  # fmt: skip
    return k_rows, v_rows
