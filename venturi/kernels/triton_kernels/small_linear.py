"""y = x W^T for few rows, at the speed of reading W, with its neighbours fused in.

Before: RMS normalization of x (the row's factor is applied after the product, so x is read once). After: bias,
act(gate) * up of two weight tiles, the factors of an fp8 weight, residual addition. Programs take BLOCK_N outputs and
all of K; while the kernel before still runs, they already pull the start of their weights into L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.activations import activate
from venturi.kernels.triton_kernels.launch import options


@dataclass(frozen=True)
class SmallLinearConfig:
    """block_n outputs and block_k inputs a tile; swap: weights are the left operand (wgmma from 64 outputs on);
    prefetch: inputs per output row that are pulled into L2 before the wait for the kernel before."""

    block_n: int = 16
    block_k: int = 256
    stages: int = 4
    warps: int = 4
    swap: bool = False
    prefetch: int = 0


@triton.jit
def prefetch_rows(w, first, rows_end, K, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """Pull w[first : first + ROWS, :LENGTH] into L2, a cache line a thread."""
    per_line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, LENGTH // per_line) * per_line
    row = first + tl.arange(0, ROWS)
    row = tl.where(row < rows_end, row, first)
    address = w + row[:, None].to(tl.int64) * K + tl.where(line < K, line, 0)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def product(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T; x [rows, k], w [k, outputs] or, swapped, x [k, rows] and w [outputs, k]."""
    w = w.to(x.dtype)
    return tl.dot(w, x, acc, input_precision="ieee") if SWAP else tl.dot(x, w, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def small_linear_kernel(
    x, w, scales, norm, residual, bias, out, rows, N, K, x_row, residual_row, eps, offset,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
    KIND: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, PREFETCH: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, M)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(w, first, N, K, BLOCK_N, PREFETCH)
            if GATED:
                prefetch_rows(w + N.to(tl.int64) * K, first, N, K, BLOCK_N, PREFETCH)
        gdc_wait()
    row_in, n_in = m < rows, n < N
    if SWAP:
        x_at = x + m[None, :] * x_row + k[:, None]
        w_at = w + n[:, None].to(tl.int64) * K + k[None, :]
        x_in, w_in = row_in[None, :], n_in[:, None]
        acc = tl.zeros([BLOCK_N, M], tl.float32)
    else:
        x_at = x + m[:, None] * x_row + k[None, :]
        w_at = w + n[None, :].to(tl.int64) * K + k[:, None]
        x_in, w_in = row_in[:, None], n_in[None, :]
        acc = tl.zeros([M, BLOCK_N], tl.float32)
    up = acc
    squares = tl.zeros([M], tl.float32)
    for at in range(0, K, BLOCK_K):
        if EVEN_K:
            x_mask, w_mask = x_in, w_in
        elif SWAP:
            x_mask, w_mask = x_in & (at + k[:, None] < K), w_in & (at + k[None, :] < K)
        else:
            x_mask, w_mask = x_in & (at + k[None, :] < K), w_in & (at + k[:, None] < K)
        tile = tl.load(x_at + at, mask=x_mask, other=0.0)
        weights = tl.load(w_at + at, mask=w_mask, other=0.0)
        if NORM:
            wide = tile.to(tl.float32)
            squares += tl.sum(wide * wide, 0 if SWAP else 1)
            factor = tl.load(norm + at + k, mask=at + k < K, other=0.0).to(tl.float32) + offset
            tile = (wide * (factor[:, None] if SWAP else factor[None, :])).to(x.dtype.element_ty)
        acc = product(tile, weights, acc, SWAP)
        if GATED:
            more = tl.load(w_at + at + N.to(tl.int64) * K, mask=w_mask, other=0.0)
            up = product(tile, more, up, SWAP)
    n_at = n[:, None] if SWAP else n[None, :]
    m_at = m[None, :] if SWAP else m[:, None]
    inside = (n_at < N) & (m_at < rows)
    if SCALED:
        acc *= tl.load(scales + n_at, mask=n_at < N, other=0.0)
        if GATED:
            up *= tl.load(scales + N + n_at, mask=n_at < N, other=0.0)
    if NORM:
        row_scale = tl.rsqrt(squares / K + eps)
        row_scale = row_scale[None, :] if SWAP else row_scale[:, None]
        acc *= row_scale
        up *= row_scale
    if BIAS:
        acc += tl.load(bias + n_at, mask=n_at < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n_at, mask=n_at < N, other=0.0).to(tl.float32)
    if GATED:
        acc = activate(acc, KIND) * up
    if RESIDUAL:
        acc += tl.load(residual + m_at * residual_row + n_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m_at.to(tl.int64) * N + n_at, acc.to(out.dtype.element_ty), mask=inside)


def small_linear(
    x: Tensor, w: Tensor, config: SmallLinearConfig, *, scales: Tensor | None = None, norm: Tensor | None = None,
    eps: float = 0.0, offset: float = 0.0, residual: Tensor | None = None, bias: Tensor | None = None,
    gated: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[rows, K] x [N, K]^T -> [rows, N].

    Args:
        x: at most 64 rows. w: contiguous, x's dtype or float8_e4m3fn with scales [N] fp32. norm: [K] RMS norm weight
            (plus offset) applied to x. gated: "silu" or "gelu_tanh"; w is then [2N, K], gates first. residual: [rows, N].
    """
    rows, k = x.shape
    n = w.shape[0] // 2 if gated else w.shape[0]
    out = torch.empty(rows, n, dtype=out_dtype or x.dtype, device=x.device)
    m = max(16, triton.next_power_of_2(rows))
    block_k = min(config.block_k, triton.next_power_of_2(k))
    small_linear_kernel[(triton.cdiv(n, config.block_n),)](
        x, w, x if scales is None else scales, x if norm is None else norm, x if residual is None else residual,
        x if bias is None else bias, out, rows, n, k, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        offset, NORM=norm is not None, GATED=gated is not None, RESIDUAL=residual is not None, BIAS=bias is not None,
        SCALED=scales is not None, KIND=gated or "silu", SWAP=config.swap, EVEN_K=k % block_k == 0,
        PREFETCH=config.prefetch, M=m, BLOCK_N=config.block_n, BLOCK_K=block_k, num_warps=config.warps,
        num_stages=config.stages, **options(x),
    )  # fmt: skip
    return out
