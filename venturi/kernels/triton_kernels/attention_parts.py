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
def scaled_scores(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """Products of queries and keys as scores in units of log2."""
    if SOFTCAP:
        capped = scores * scale / softcap
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * capped)) - 1.0
        return softcap * tanh * 1.4426950408889634
    return scores * (scale * 1.4426950408889634)


@triton.jit
def score_tile(
    q, q_tail, k, k_tail, key_scale, scale, softcap, SOFTCAP: tl.constexpr, TAIL: tl.constexpr, SCALED: tl.constexpr
):
    """Scores in units of log2, from the (main and tail) features of queries and transposed keys; key_scale: what a
    key's codes are multiplied by."""
    scores = tl.dot(q, k, input_precision="ieee")
    if TAIL:
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
    if SCALED:
        scores = scores * key_scale[None, :]
    return scaled_scores(scores, scale, softcap, SOFTCAP)


@triton.jit
def weigh_tile(scores, seen, top, total):
    """One step of the online softmax: weights of a tile of scores, the factor that sums so far fade by, and the new
    maximum and sum."""
    scores = tl.where(seen[None, :], scores, -float("inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    weight = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    return weight, fade, new, total * fade + tl.sum(weight, 1)


@triton.jit
def absorb_tile(scores, values, value_scale, seen, top, total, acc, SCALED: tl.constexpr):
    """Maximum, sum and weighted values after a tile of scores; value_scale: what a value's codes are multiplied by."""
    weight, fade, top, total = weigh_tile(scores, seen, top, total)
    if SCALED:
        weight = weight * value_scale[None, :]
    acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def finish_heads(
    acc, top, total, out, partial, sums, sinks, own_ticket, split, active, out_at, head, row_in, v_dim: tl.constexpr,
    SPLITS: tl.constexpr, SINKS: tl.constexpr, M: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Store the outputs of a tile of heads; with splits leave this one's, and reduce the `active` ones if it is the
    last of them."""
    feature = tl.arange(0, DV)
    inside = row_in[:, None] & (feature[None, :] < v_dim)
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=row_in, other=0.0).to(tl.float32) * 1.4426950408889634
            total += tl.exp2(sink - top)
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + out_at[:, None] * v_dim + feature[None, :], result, mask=inside)
    else:
        place = out_at * SPLITS + split
        tl.store(partial + place[:, None] * v_dim + feature[None, :], acc, mask=inside)
        tl.store(sums + place * 2, top, mask=row_in)
        tl.store(sums + place * 2 + 1, total, mask=row_in)
        tl.debug_barrier()
        ticket = tl.atomic_add(own_ticket, 1, sem="acq_rel")
        if ticket == active - 1:
            tl.debug_barrier()
            reduce_splits(partial, sums, sinks, out, out_at, head, row_in, active, v_dim, SPLITS, SINKS, M, DV)
            tl.store(own_ticket, 0)


@triton.jit
def reduce_splits(
    partial, sums, sinks, out, out_at, head, inside, active, v_dim: tl.constexpr, SPLITS: tl.constexpr,
    SINKS: tl.constexpr, M: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """out = sum_i acc_i 2^(top_i - top) / sum_i sum_i 2^(top_i - top), for a tile of heads."""
    each, feature = tl.arange(0, SPLITS), tl.arange(0, DV)
    place = out_at[:, None] * SPLITS + each[None, :]
    there = inside[:, None] & (each[None, :] < active)
    tops = tl.load(sums + place * 2, mask=there, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(sums + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
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
        row, counts = out_at * SPLITS + i, i < active
        one = tl.load(sums + row * 2, mask=inside & counts, other=-float("inf"), cache_modifier=".cg")
        piece = tl.load(
            partial + row[:, None] * v_dim + feature[None, :], mask=kept & counts, other=0.0, cache_modifier=".cg"
        )
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
