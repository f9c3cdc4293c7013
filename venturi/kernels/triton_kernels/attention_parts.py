"""What the attention kernels share: scores of a tile, reduction of split results, types and widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class TileConfig:
    """keys a tile, queries a tile (prefill), warps, pipeline stages."""

    keys: int = 64
    queries: int = 128
    warps: int = 4
    stages: int = 3


@triton.jit
def narrow(q, KIND: tl.constexpr):
    """Queries in the type of the products; fp16 (with an fp8 cache) saturates instead of overflowing."""
    if tl.float16 == KIND and q.dtype != tl.float16:
        return tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return q.to(KIND)


@triton.jit
def score_tile(q, q_tail, k, k_tail, scale, softcap, SOFTCAP: tl.constexpr, TAIL: tl.constexpr):
    """Scores in units of log2, from the (main and tail) features of queries and transposed keys."""
    scores = tl.dot(q, k, input_precision="ieee")
    if TAIL:
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
    if SOFTCAP:
        capped = scores * scale / softcap
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * capped)) - 1.0
        return softcap * tanh * 1.4426950408889634
    return scores * (scale * 1.4426950408889634)


@triton.jit
def reduce_splits(
    partial, sums, sinks, out, out_at, head, inside, v_dim: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
    M: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """out = sum_i acc_i 2^(top_i - top) / sum_i sum_i 2^(top_i - top), for a tile of heads."""
    each, feature = tl.arange(0, SPLITS), tl.arange(0, DV)
    place = out_at[:, None] * SPLITS + each[None, :]
    tops = tl.load(sums + place * 2, mask=inside[:, None], other=0.0, cache_modifier=".cg")
    totals = tl.load(sums + place * 2 + 1, mask=inside[:, None], other=1.0, cache_modifier=".cg")
    top = tl.max(tops, 1)
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    total = tl.sum(totals * tl.exp2(tops - top[:, None]), 1)
    if SINKS:
        total += tl.exp2(sink - top)
    kept = inside[:, None] & (feature[None, :] < v_dim)
    acc = tl.zeros([M, DV], tl.float32)
    for i in tl.static_range(SPLITS):
        row = out_at * SPLITS + i
        one = tl.load(sums + row * 2, mask=inside, other=0.0, cache_modifier=".cg")
        piece = tl.load(partial + row[:, None] * v_dim + feature[None, :], mask=kept, other=0.0, cache_modifier=".cg")
        acc += piece * tl.exp2(one - top)[:, None]
    tl.store(
        out + out_at[:, None] * v_dim + feature[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=kept
    )


def product_kind(q: Tensor, cache: Tensor) -> tl.dtype:
    """The type that queries, keys and probabilities are multiplied in: fp8 converts to fp16 in one instruction."""
    if cache.dtype == torch.float8_e4m3fn:
        return tl.float16
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]


def features(k_dim: int) -> tuple[int, int]:
    """Key features as a power of two and a tail, so that 576 costs 512 + 64 and not 1024."""
    whole = triton.next_power_of_2(k_dim)
    if whole == k_dim or whole <= 128:
        return max(16, whole), 0
    return whole // 2, max(16, triton.next_power_of_2(k_dim - whole // 2))
