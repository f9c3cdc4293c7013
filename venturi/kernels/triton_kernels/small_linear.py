"""y = x W^T for few rows, at the speed of reading W, with what follows fused in.

Weights are the left operand, so that a tile of W goes from memory through shared memory straight into wgmma. A program
takes BLOCK_N outputs and one of SPLITS parts of K; the last of a tile's programs to finish adds the parts. After the
product: factors of fp8 operands, bias, act(gate) * up of two weight tiles, residual addition.
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
    """Tile of block_n outputs and block_k inputs; splits: parts of K."""

    block_n: int = 64
    block_k: int = 128
    stages: int = 4
    warps: int = 4
    splits: int = 1


@triton.jit
def add_parts(acc, partial, at, split_stride, SPLITS: tl.constexpr):
    """The sum of all parts of a tile, in the order of the splits."""
    acc = tl.zeros_like(acc)
    for i in tl.static_range(SPLITS):
        acc += tl.load(partial + i * split_stride + at, cache_modifier=".cg")
    return acc


@triton.jit
def weight_terms(scales, bias, n, N, GATED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr):
    """Factors and summands of a tile's outputs, and of its second half, that belong to the weights. Nobody writes
    them, so a kernel may ask for them before the one in front has ended."""
    factor, factor_up, added, added_up = 1.0, 1.0, 0.0, 0.0
    n_at = n[:, None]
    if SCALED:
        factor = tl.load(scales + n_at, mask=n_at < N, other=0.0)
        if GATED:
            factor_up = tl.load(scales + N + n_at, mask=n_at < N, other=0.0)
    if BIAS:
        added = tl.load(bias + n_at, mask=n_at < N, other=0.0).to(tl.float32)
        if GATED:
            added_up = tl.load(bias + N + n_at, mask=n_at < N, other=0.0).to(tl.float32)
    return factor, factor_up, added, added_up


@triton.jit
def row_terms(x_scales, residual, n, m, rows, N, residual_row, SCALED: tl.constexpr, RESIDUAL: tl.constexpr):
    """A tile's factors by row, and what is added last. Asked for before the product, they cost no time after it."""
    factor, rest = 1.0, 0.0
    n_at, m_at = n[:, None], m[None, :]
    if SCALED:
        factor = tl.load(x_scales + m_at, mask=m_at < rows, other=0.0)
    if RESIDUAL:
        inside = (n_at < N) & (m_at < rows)
        rest = tl.load(residual + m_at * residual_row + n_at, mask=inside, other=0.0).to(tl.float32)
    return factor, rest


@triton.jit
def finish_tile(acc, up, of_weights, of_rows, out, n, m, rows, N, GATED: tl.constexpr, KIND: tl.constexpr):
    """Everything after the product, for one tile [outputs, rows], with its `weight_terms` and `row_terms`."""
    factor, factor_up, added, added_up = of_weights
    row_factor, rest = of_rows
    acc = acc * (factor * row_factor) + added
    if GATED:
        acc = activate(acc, KIND) * (up * (factor_up * row_factor) + added_up)
    n_at, m_at = n[:, None], m[None, :]
    inside = (n_at < N) & (m_at < rows)
    tl.store(out + m_at.to(tl.int64) * N + n_at, (acc + rest).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def small_linear_kernel(
    x, w, x_scales, scales, residual, bias, out, partial, tickets, rows, N, K, x_row, residual_row,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr,
    EVEN_K: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_N
    n, m, k = first + tl.arange(0, BLOCK_N), tl.arange(0, M), tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = split * length
    second = w + N.to(tl.int64) * K
    of_weights = weight_terms(scales, bias, n, N, GATED, BIAS, SCALED)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    of_rows = row_terms(x_scales, residual, n, m, rows, N, residual_row, SCALED, RESIDUAL)
    row_in, n_in = (m < rows)[None, :], (n < N)[:, None]
    x_at = x + m[None, :] * x_row + k[:, None]
    w_at = n[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros([BLOCK_N, M], tl.float32)
    up = tl.zeros([BLOCK_N, M], tl.float32)
    for at in range(start, tl.minimum(start + length, K), BLOCK_K):
        if EVEN_K:
            x_mask, w_mask = row_in, n_in
        else:
            x_mask, w_mask = row_in & (at + k[:, None] < K), n_in & (at + k[None, :] < K)
        tile_x = tl.load(x_at + at, mask=x_mask, other=0.0)
        tile_w = tl.load(w + w_at + at, mask=w_mask, other=0.0)
        acc = tl.dot(tile_w, tile_x, acc, input_precision="ieee")
        if GATED:
            tile_u = tl.load(second + w_at + at, mask=w_mask, other=0.0)
            up = tl.dot(tile_u, tile_x, up, input_precision="ieee")
    if SPLITS == 1:
        finish_tile(acc, up, of_weights, of_rows, out, n, m, rows, N, GATED, KIND)
    else:
        wide: tl.constexpr = 2 if GATED else 1
        place = ((tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]) * wide) * M + m[None, :]
        stride = tl.num_programs(0) * BLOCK_N * wide * M
        tl.store(partial + split * stride + place, acc)
        if GATED:
            tl.store(partial + split * stride + place + M, up)
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            tl.debug_barrier()
            acc = add_parts(acc, partial, place, stride, SPLITS)
            if GATED:
                up = add_parts(up, partial, place + M, stride, SPLITS)
            finish_tile(acc, up, of_weights, of_rows, out, n, m, rows, N, GATED, KIND)
            tl.store(tickets + tile, 0)


def small_linear(
    x: Tensor, w: Tensor, config: SmallLinearConfig, *, tickets: Tensor, x_scales: Tensor | None = None,
    scales: Tensor | None = None, residual: Tensor | None = None, bias: Tensor | None = None, gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[rows, K] x [N, K]^T -> [rows, N].

    Args:
        x: at most 64 rows. w: contiguous, x's dtype. Both may be e4m3, with x_scales [rows] and scales [N] fp32.
        tickets: int32 zeros, one a tile of outputs; zero again afterwards. gated: "silu" or "gelu_tanh"; w is then
            [2N, K], gates first. residual: [rows, N], added last. out_dtype: default x's.
    """
    rows, k = x.shape
    n = w.shape[0] // 2 if gated else w.shape[0]
    out = torch.empty(rows, n, dtype=out_dtype or x.dtype, device=x.device)
    m = max(16, triton.next_power_of_2(rows))
    block_k = min(config.block_k, max(16, triton.next_power_of_2(k)))
    count = triton.cdiv(n, config.block_n)
    partial = out
    if config.splits > 1:
        size = config.splits * count * config.block_n * m * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    small_linear_kernel[(count, config.splits)](
        x, w, x if x_scales is None else x_scales, x if scales is None else scales, x if residual is None else residual,
        x if bias is None else bias, out, partial, tickets, rows, n, k, x.stride(0),
        0 if residual is None else residual.stride(0), GATED=gated is not None, RESIDUAL=residual is not None,
        BIAS=bias is not None, SCALED=scales is not None, KIND=gated or "silu", EVEN_K=k % block_k == 0,
        SPLITS=config.splits, M=m, BLOCK_N=config.block_n, BLOCK_K=block_k,
        num_warps=config.warps, num_stages=config.stages, **options(x),
    )  # fmt: skip
    return out
