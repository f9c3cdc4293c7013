"""Products of tokens with their experts' weights: every tile of an expert's tokens in one launch, graphs allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.moe import ExpertWeights, Gate
from venturi.kernels.triton_kernels.activations import activate
from venturi.kernels.triton_kernels.launch import options
from venturi.kernels.triton_kernels.routing import Tiles, group


@triton.jit
def grouped_linear_kernel(
    x, w, bias, out, order, table, K, N, x_row, share, alpha, limit,
    KIND: tl.constexpr, BIAS: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[pair, n] = x[pair // share] . w[expert, n], or with KIND the gated product of two rows of w.

    KIND: "" none; silu, gelu_tanh: rows n and N + n are gate and up; clamped: rows 2n and 2n + 1.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(table + tl.program_id(1) * 3)
    if expert < 0:
        return
    place = tl.load(table + tl.program_id(1) * 3 + 1) + tl.arange(0, M)
    inside = place < tl.load(table + tl.program_id(1) * 3 + 2)
    pair = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.where(n < N, n, 0)
    k = tl.arange(0, BLOCK_K)
    gated: tl.constexpr = KIND != ""
    w_rows = 2 * N if gated else N
    first = 2 * column if KIND == "clamped" else column
    second = 2 * column + 1 if KIND == "clamped" else N + column
    w += expert.to(tl.int64) * w_rows * K
    x_at = x + (pair // share)[:, None] * x_row + k[None, :]
    first_at = w + first[None, :].to(tl.int64) * K + k[:, None]
    second_at = w + second[None, :].to(tl.int64) * K + k[:, None]
    sums = tl.zeros([M, BLOCK_N], tl.float32)
    ups = tl.zeros([M, BLOCK_N], tl.float32)
    for at in range(0, K, BLOCK_K):
        some = inside[:, None] if EVEN_K else inside[:, None] & (at + k < K)[None, :]
        rows = tl.load(x_at + at, mask=some, other=0.0)
        if EVEN_K:
            left = tl.load(first_at + at)
        else:
            left = tl.load(first_at + at, mask=(at + k < K)[:, None], other=0.0)
        sums = tl.dot(rows, left, sums, input_precision="ieee")
        if gated:
            if EVEN_K:
                right = tl.load(second_at + at)
            else:
                right = tl.load(second_at + at, mask=(at + k < K)[:, None], other=0.0)
            ups = tl.dot(rows, right, ups, input_precision="ieee")
    if BIAS:
        bias += expert.to(tl.int64) * w_rows
        sums += tl.load(bias + first)[None, :].to(tl.float32)
        if gated:
            ups += tl.load(bias + second)[None, :].to(tl.float32)
    if KIND == "clamped":
        gate = tl.where(sums > limit, limit, sums)
        up = tl.where(ups > limit, limit, tl.where(ups < -limit, -limit, ups))
        sums = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    elif gated:
        sums = activate(sums, KIND) * ups
    tl.store(
        out + pair[:, None] * N + n[None, :], sums.to(out.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :]
    )


@triton.jit
def combine_kernel(parts, weights, out, size, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[token] = sum_k weights[token, k] * parts[token * K + k], in fp32, in the order of k."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        part = tl.load(parts + (row * K + k) * size + column, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + row * K + k)
    tl.store(out + row * size + column, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class GroupedConfig:
    """Tile of a grouped product: m pairs, n outputs, k terms a step."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3

    @staticmethod
    def of(pairs: int, experts: int, itemsize: int) -> GroupedConfig:
        """By how many pairs an expert has when all have as many; weights of a few tokens are streamed in wide rows."""
        each, k = pairs / experts, 128 // itemsize
        if each <= 16:
            return GroupedConfig(16, 32, 2 * k, 4, 4)
        if each <= 64:
            return GroupedConfig(32 if each <= 32 else 64, 64, k, 4, 4)
        return GroupedConfig(128, 64, k, 8, 3)


def grouped_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, tiles: Tiles, share: int, gate: Gate | None, config: GroupedConfig
) -> Tensor:
    """[pairs, n]: row x[pair // share] times the weights of the pair's expert, gated if asked.

    x: [rows, k]. w: [experts, n, k], or [experts, 2n, k] with `gate`; contiguous. bias: [experts, n or 2n].
    """
    outputs, depth = w.shape[1] // (2 if gate else 1), w.shape[2]
    out = torch.empty(len(tiles.order), outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, config.n), len(tiles.table))
    if len(tiles.order):
        grouped_linear_kernel[grid](
            x, w, bias if bias is not None else w, out, tiles.order, tiles.table, depth, outputs, x.stride(0), share,
            *(gate.clamped if gate and gate.clamped else (0.0, 0.0)), KIND=(gate.on_device or "") if gate else "",
            BIAS=bias is not None, M=config.m, BLOCK_N=config.n, BLOCK_K=config.k, EVEN_K=depth % config.k == 0,
            num_warps=config.warps, num_stages=config.stages, **options(x),
        )  # fmt: skip
    return out


def combine(parts: Tensor, weights: Tensor) -> Tensor:
    """[tokens, n]: the weighted sum of each token's parts. parts: [tokens * k, n]; weights: [tokens, k] fp32."""
    tokens, k = weights.shape
    size = parts.shape[1]
    out = torch.empty(tokens, size, dtype=parts.dtype, device=parts.device)
    if tokens:
        combine_kernel[(tokens, triton.cdiv(size, 1024))](parts, weights, out, size, K=k, BLOCK=1024, **options(parts))
    return out


def experts_forward(x: Tensor, weights: Tensor, experts: Tensor, of: ExpertWeights, gate: Gate) -> Tensor:
    """`venturi.kernels.moe.experts_forward` in four launches; the host does not learn who goes where.

    experts: int32. The gate is one that `Gate.on_device` names.
    """
    config = GroupedConfig.of(experts.numel(), len(of.down), x.element_size())
    tiles = group(experts, len(of.down), config.m)
    inner = grouped_linear(x, of.gate_up, of.gate_up_bias, tiles, experts.shape[1], gate, config)
    return combine(grouped_linear(inner, of.down, of.down_bias, tiles, 1, None, config), weights)
