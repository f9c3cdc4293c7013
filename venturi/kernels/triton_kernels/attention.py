"""Attention over the paged cache: split over keys for decoding, tiles of queries for prefill.

Both are the online softmax of FlashAttention (Dao et al. 2022); the split form reduces partial results as in
Flash-Decoding, by the program that finishes a (sequence, kv head) last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.triton_kernels.launch import num_sms, options

MAX_SPLITS = 32


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


@triton.jit
def decode_kernel(
    q, k_cache, v_cache, out, tables, table_rows, seq_lens, sinks, partial, sums, tickets, scale, softcap,
    q_row, q_head, k_slot, v_slot, table_row, heads: tl.constexpr, kv_heads: tl.constexpr, k_dim: tl.constexpr,
    v_dim: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr,
    DV: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, M query heads of a kv head, split): a run of keys; then the last one to finish reduces.

    partial: [sequences, heads, SPLITS, v_dim] fp32. sums: [sequences, heads, SPLITS, 2] maximum and sum.
    """
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    parts: tl.constexpr = (GROUP + M - 1) // M
    kv_head, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(seq_lens + sequence)
    table = tables + tl.load(table_rows + sequence).to(tl.int64) * table_row
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // N * N
    run = tl.cdiv(tl.cdiv(length - first, N), SPLITS) * N
    start = first + split * run
    end = tl.minimum(start + run, length)
    row, column, feature = tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    member = part * M + row
    head = kv_head * GROUP + member
    row_in = member < GROUP
    q_base = q + sequence * q_row + head[:, None] * q_head
    q_main = tl.load(q_base + column[None, :], mask=row_in[:, None] & (column[None, :] < k_dim), other=0.0)
    q_main = narrow(q_main, KIND)
    q_tail = q_main
    if TAIL > 0:
        tail = D + tl.arange(0, TAIL)
        q_tail = tl.load(q_base + tail[None, :], mask=row_in[:, None] & (tail[None, :] < k_dim), other=0.0)
        q_tail = narrow(q_tail, KIND)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for at in range(start, end, N):
        place = at + tl.arange(0, N)
        seen = place < end
        if WINDOW > 0:
            seen = seen & (place >= length - WINDOW)
        block = tl.load(table + place // SIZE, mask=place < end, other=0).to(tl.int64)
        slot = block * SIZE + place % SIZE
        k_base = k_cache + slot[None, :] * k_slot + kv_head * k_dim
        keys = tl.load(k_base + column[:, None], mask=seen[None, :] & (column[:, None] < k_dim), other=0.0).to(KIND)
        k_tail = keys
        if TAIL > 0:
            tail = D + tl.arange(0, TAIL)
            k_tail = tl.load(k_base + tail[:, None], mask=seen[None, :] & (tail[:, None] < k_dim), other=0.0).to(KIND)
        scores = score_tile(q_main, q_tail, keys, k_tail, scale, softcap, SOFTCAP, TAIL)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        v_base = v_cache + slot[:, None] * v_slot + kv_head * v_dim
        values = tl.load(v_base + feature[None, :], mask=seen[:, None] & (feature[None, :] < v_dim), other=0.0).to(KIND)
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new
    out_at = sequence * heads + head
    inside = row_in[:, None] & (feature[None, :] < v_dim)
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=row_in, other=0.0).to(tl.float32) * 1.4426950408889634
            total += tl.exp2(sink - top)
        tl.store(
            out + out_at[:, None] * v_dim + feature[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=inside,
        )
    else:
        place = (out_at * SPLITS + split)[:, None]
        tl.store(partial + place * v_dim + feature[None, :], acc, mask=inside)
        tl.store(sums + (out_at * SPLITS + split) * 2, top, mask=row_in)
        tl.store(sums + (out_at * SPLITS + split) * 2 + 1, total, mask=row_in)
        tl.debug_barrier()
        own_ticket = tickets + sequence * (kv_heads * parts) + tl.program_id(1)
        ticket = tl.atomic_add(own_ticket, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            tl.debug_barrier()
            reduce_splits(partial, sums, sinks, out, out_at, head, row_in, v_dim, SPLITS, SINKS, M, DV)
            tl.store(own_ticket, 0)


@triton.jit
def prefill_kernel(
    q, k_cache, v_cache, out, tables, table_rows, query_starts, seq_lens, tile_seq, tile_start, sinks, scale, softcap,
    q_row, q_head, k_slot, v_slot, table_row, heads: tl.constexpr, kv_heads: tl.constexpr, k_dim: tl.constexpr,
    v_dim: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of M queries of one sequence, head) over all keys that the tile may see."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.load(tile_seq + tile).to(tl.int64)
    offset = tl.load(tile_start + tile)
    begin, stop = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    length = tl.load(seq_lens + sequence)
    table = tables + tl.load(table_rows + sequence).to(tl.int64) * table_row
    kv_head = head // (heads // kv_heads)
    row, column, feature = tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    token = begin + offset + row
    own = length - (stop - begin) + offset + row
    row_in = token < stop
    q_base = q + token[:, None].to(tl.int64) * q_row + head * q_head
    q_main = tl.load(q_base + column[None, :], mask=row_in[:, None] & (column[None, :] < k_dim), other=0.0)
    q_main = narrow(q_main, KIND)
    q_tail = q_main
    if TAIL > 0:
        tail = D + tl.arange(0, TAIL)
        q_tail = tl.load(q_base + tail[None, :], mask=row_in[:, None] & (tail[None, :] < k_dim), other=0.0)
        q_tail = narrow(q_tail, KIND)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    newest = length - (stop - begin) + offset
    first = 0
    if WINDOW > 0:
        first = tl.maximum(newest - WINDOW + 1, 0) // N * N
    last = tl.minimum(newest + M, length)
    for at in range(first, last, N):
        place = at + tl.arange(0, N)
        block = tl.load(table + place // SIZE, mask=place < length, other=0).to(tl.int64)
        slot = block * SIZE + place % SIZE
        present = place < length
        k_base = k_cache + slot[None, :] * k_slot + kv_head * k_dim
        keys = tl.load(k_base + column[:, None], mask=present[None, :] & (column[:, None] < k_dim), other=0.0).to(KIND)
        k_tail = keys
        if TAIL > 0:
            tail = D + tl.arange(0, TAIL)
            k_tail = tl.load(k_base + tail[:, None], mask=present[None, :] & (tail[:, None] < k_dim), other=0.0).to(
                KIND
            )
        scores = score_tile(q_main, q_tail, keys, k_tail, scale, softcap, SOFTCAP, TAIL)
        seen = place[None, :] <= own[:, None]
        if WINDOW > 0:
            seen = seen & (place[None, :] > own[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        v_base = v_cache + slot[:, None] * v_slot + kv_head * v_dim
        values = tl.load(v_base + feature[None, :], mask=present[:, None] & (feature[None, :] < v_dim), other=0.0).to(
            KIND
        )
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total += tl.exp2(sink - top)
    inside = row_in[:, None] & (feature[None, :] < v_dim)
    result = acc / tl.where(row_in, total, 1.0)[:, None]
    tl.store(
        out + (token[:, None].to(tl.int64) * heads + head) * v_dim + feature[None, :],
        result.to(out.dtype.element_ty),
        mask=inside,
    )


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None
) -> Tensor:
    """See `venturi.kernels.attention.paged_attention`. For prefill, batch.workspace has tile_seq and tile_start.

    In a mixed batch the leading sequences of one token go through the decode kernel, the others through prefill's.
    """
    rows, kv_heads = len(batch.seq_lens), k_cache.shape[2]
    if batch.max_query == 1:
        return decode(q, k_cache, v_cache, batch, kind, sinks, num_splits(rows, kv_heads, batch.max_keys, q.device))
    out = prefill(q, k_cache, v_cache, batch, kind, sinks)
    if batch.num_decodes:
        splits = num_splits(batch.num_decodes, kv_heads, batch.max_keys, q.device)
        decode(q[: batch.num_decodes], k_cache, v_cache, batch, kind, sinks, splits, out=out)
    return out


def product_kind(q: Tensor, cache: Tensor) -> tl.dtype:
    """The type that queries, keys and probabilities are multiplied in: fp8 converts to fp16 in one instruction."""
    if cache.dtype == torch.float8_e4m3fn:
        return tl.float16
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]


def decode_config(rows: int, kv_heads: int, device: torch.device) -> TileConfig:
    """Few programs: long tiles and many warps for latency; many: shorter tiles, more of them at once."""
    if rows * kv_heads < num_sms(device.index or 0):
        return TileConfig(keys=128, warps=8, stages=2)
    return TileConfig(keys=64, warps=4, stages=3)


def num_splits(rows: int, kv_heads: int, max_keys: int, device: torch.device) -> int:
    """Parts that the keys are cut into, so that all multiprocessors have work and no part is shorter than a tile."""
    programs = max(1, rows * kv_heads)
    wanted = triton.cdiv(2 * num_sms(device.index or 0), programs)
    longest = max(1, max_keys // 128)
    return min(MAX_SPLITS, 1 << (min(wanted, longest).bit_length() - 1))


def _features(k_dim: int) -> tuple[int, int]:
    """Key features as a power of two and a tail, so that 576 costs 512 + 64 and not 1024."""
    whole = triton.next_power_of_2(k_dim)
    if whole == k_dim or whole <= 128:
        return max(16, whole), 0
    return whole // 2, max(16, triton.next_power_of_2(k_dim - whole // 2))


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None,
    splits: int, config: TileConfig | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query token for each of the first len(q) sequences, into `out` if given.

    Allocates its partial results; tickets are in batch.workspace, zero between calls.
    """
    rows, heads, k_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    if out is None:
        out = torch.empty(rows, heads, v_dim, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    wide, tail = _features(k_dim)
    partial = sums = out
    if splits > 1:
        partial = torch.empty(rows, heads, splits, v_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
        if "tickets" not in batch.workspace:
            batch.workspace["tickets"] = torch.zeros(max(rows * heads, 1), dtype=torch.int32, device=q.device)
    if config is None:
        config = decode_config(rows, kv_heads, q.device) if wide <= 128 else TileConfig(keys=32, stages=2)
    m = max(16, min(triton.next_power_of_2(group), 64 if wide <= 128 else 16))
    decode_kernel[(rows, kv_heads * triton.cdiv(group, m), splits)](
        q, k_cache, v_cache, out, batch.block_tables, batch.table_rows, batch.seq_lens,
        q if sinks is None else sinks, partial, sums,
        batch.workspace.get("tickets", out), kind.scale, kind.softcap or 1.0, q.stride(0), q.stride(1),
        k_cache.stride(1), v_cache.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads,
        k_dim=k_dim, v_dim=v_dim, SIZE=k_cache.shape[1], SPLITS=splits, WINDOW=kind.window or 0,
        SOFTCAP=kind.softcap is not None, SINKS=sinks is not None, GROUP=group,
        M=m, N=config.keys, D=wide, TAIL=tail, DV=triton.next_power_of_2(v_dim), KIND=product_kind(q, k_cache),
        num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
    return out


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
    sinks: Tensor | None,
    config: TileConfig | None = None,
) -> Tensor:
    """Any number of query tokens a sequence."""
    tokens, heads, k_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    out = torch.empty(tokens, heads, v_dim, dtype=q.dtype, device=q.device)
    wide, tail = _features(k_dim)
    config = config or prefill_config(k_dim)
    tile_seq, tile_start = batch.workspace["tile_seq"], batch.workspace["tile_start"]
    prefill_kernel[(len(tile_seq), heads)](
        q, k_cache, v_cache, out, batch.block_tables, batch.table_rows, batch.query_starts, batch.seq_lens,
        tile_seq, tile_start,
        q if sinks is None else sinks, kind.scale, kind.softcap or 1.0, q.stride(0), q.stride(1), k_cache.stride(1),
        v_cache.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim,
        SIZE=k_cache.shape[1], WINDOW=kind.window or 0, SOFTCAP=kind.softcap is not None, SINKS=sinks is not None,
        M=config.queries, N=config.keys, D=wide, TAIL=tail, DV=triton.next_power_of_2(v_dim),
        KIND=product_kind(q, k_cache),
        num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
    return out


def prefill_config(k_dim: int) -> TileConfig:
    """The prefill kernel's tile; `tiles` must be made with its number of queries."""
    return TileConfig(64, 128, 4, 2) if k_dim <= 128 else TileConfig(32, 32, 4, 2)


def tiles(query_starts: list[int], rows: int, skip: int = 0) -> tuple[list[int], list[int]]:
    """(sequence, first query) of every tile of `rows` queries, from sequence `skip` on; a sequence's last tile, which
    takes longest, comes first."""
    found = [
        (i, at)
        for i, (a, b) in enumerate(pairwise(query_starts))
        for at in reversed(range(0, b - a, rows))
        if i >= skip
    ]
    return [i for i, _ in found], [at for _, at in found]
