"""Decoding for few sequences in one launch: rotation of queries and keys, the cache write and attention.

Keys and values of earlier tokens were written in an earlier step, so the first tile of them is requested before the
kernel in front (the projection) has ended. This holds as long as some kernel between two steps is launched without
programmatic overlap, as torch's own are, because only such a launch waits for everything before it. The newest key and
value are taken from the projections; the program with the last of them writes them to the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.triton_kernels.attention_parts import (
    TileConfig,
    absorb_tile,
    finish_heads,
    narrow,
    product_kind,
    scaled_scores,
)
from venturi.kernels.triton_kernels.launch import num_sms, options

WIDEST = 128


@triton.jit
def turn_row(x, column, partner, cos, sin, inside):
    """Features of heads, each turned with its partner's; rounded to the type they came in."""
    a = tl.load(x + column, mask=inside, other=0.0)
    b = tl.load(x + partner, mask=inside, other=0.0)
    return (a.to(tl.float32) * cos + b.to(tl.float32) * sin).to(a.dtype)


@triton.jit
def load_tile(
    k_cache, v_cache, table, at, end, oldest, kv_head, k_slot, v_slot, k_dim: tl.constexpr, v_dim: tl.constexpr,
    SIZE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Transposed keys, values and which of them count: places [at, at + N) before `end`, not older than `oldest`."""
    place, column, feature = at + tl.arange(0, N), tl.arange(0, D), tl.arange(0, DV)
    seen = (place < end) & (place >= oldest)
    slot = tl.load(table + place // SIZE, mask=seen, other=0).to(tl.int64) * SIZE + place % SIZE
    k_at = k_cache + slot[None, :] * k_slot + kv_head * k_dim + column[:, None]
    v_at = v_cache + slot[:, None] * v_slot + kv_head * v_dim + feature[None, :]
    keys = tl.load(k_at, mask=seen[None, :] & (column[:, None] < k_dim), other=0.0).to(KIND)
    values = tl.load(v_at, mask=seen[:, None] & (feature[None, :] < v_dim), other=0.0).to(KIND)
    return keys, values, seen


@triton.jit
def decode_rotated_kernel(
    q, k, v, angles, positions, slots, k_cache, v_cache, out, tables, table_rows, seq_lens, sinks, partial, sums,
    tickets, scale, softcap, q_row, q_head, k_row, k_head, v_row, v_head, k_slot, v_slot, table_row,
    heads: tl.constexpr, kv_heads: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr, pairs: tl.constexpr,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    INTERLEAVED: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, kv head, split): a run of the earlier keys, and for the last run the newest one. Programs
    that few keys leave nothing to do end at once."""
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(seq_lens + sequence)
    table = tables + tl.load(table_rows + sequence).to(tl.int64) * table_row
    position, own_slot = tl.load(positions + sequence), tl.load(slots + sequence)
    earlier, oldest, first = length - 1, 0, 0
    if WINDOW > 0:
        oldest = tl.maximum(length - WINDOW, 0)
        first = oldest // N * N
    run = tl.cdiv(tl.cdiv(earlier - first, N), SPLITS) * N
    active = tl.maximum(tl.cdiv(earlier - first, tl.maximum(run, 1)), 1)
    if split >= active:
        return
    start = first + split * run
    end = tl.minimum(start + run, earlier)
    keys, values, seen = load_tile(k_cache, v_cache, table, start, end, oldest, kv_head, k_slot, v_slot, k_dim, v_dim,
                                   SIZE, N, D, DV, KIND)  # fmt: skip
    column, feature = tl.arange(0, D), tl.arange(0, DV)
    if INTERLEAVED:
        pair, partner, negative = column // 2, column ^ 1, column % 2 == 0
    else:
        negative = column < pairs
        pair = tl.where(negative, column, column - pairs)
        partner = tl.where(negative, column + pairs, column - pairs)
    turns = column < 2 * pairs
    partner = tl.where(turns, partner, column)
    cos = tl.load(angles + position * 2 * pairs + pair, mask=turns, other=1.0)
    sin = tl.load(angles + position * 2 * pairs + pairs + pair, mask=turns, other=0.0)
    sin = tl.where(negative, -sin, sin)
    if PDL:
        gdc_wait()
    member = tl.arange(0, M)
    row_in, head = member < GROUP, kv_head * GROUP + member
    q_at = q + sequence * q_row + head[:, None] * q_head
    inside = row_in[:, None] & (column[None, :] < k_dim)
    queries = narrow(turn_row(q_at, column[None, :], partner[None, :], cos[None, :], sin[None, :], inside), KIND)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    if split == active - 1:
        kind = k_cache.dtype.element_ty
        key = turn_row(k + sequence * k_row + kv_head * k_head, column, partner, cos, sin, column < k_dim).to(kind)
        value = tl.load(v + sequence * v_row + kv_head * v_head + feature, mask=feature < v_dim, other=0.0).to(kind)
        tl.store(k_cache + own_slot * k_slot + kv_head * k_dim + column, key, mask=column < k_dim)
        tl.store(v_cache + own_slot * v_slot + kv_head * v_dim + feature, value, mask=feature < v_dim)
        product = tl.sum(queries.to(tl.float32) * key.to(KIND).to(tl.float32)[None, :], 1)
        top = scaled_scores(product, scale, softcap, SOFTCAP)
        total += 1.0
        acc += value.to(tl.float32)[None, :]
    scores = scaled_scores(tl.dot(queries, keys, input_precision="ieee"), scale, softcap, SOFTCAP)
    top, total, acc = absorb_tile(scores, values, seen, seen, top, total, acc, False)
    for at in range(start + N, end, N):
        keys, values, seen = load_tile(k_cache, v_cache, table, at, end, oldest, kv_head, k_slot, v_slot, k_dim, v_dim,
                                       SIZE, N, D, DV, KIND)  # fmt: skip
        scores = scaled_scores(tl.dot(queries, keys, input_precision="ieee"), scale, softcap, SOFTCAP)
        top, total, acc = absorb_tile(scores, values, seen, seen, top, total, acc, False)
    finish_heads(acc, top, total, out, partial, sums, sinks, tickets + sequence * kv_heads + kv_head, split,
                 active, sequence * heads + head, head, row_in, v_dim, SPLITS, SINKS, M, DV)  # fmt: skip


def fits(q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor, angles: Tensor | None, batch: AttentionBatch) -> bool:
    """One query each of so few sequences that latency counts, not bandwidth; rotated heads of usual width."""
    rows, kv_heads, width = k.shape
    few = batch.max_query == 1 and rows * kv_heads < num_sms(q.device.index or 0)
    shared = k_cache.data_ptr() == v_cache.data_ptr()
    narrow = k_cache.dtype == torch.int8
    return few and not shared and not narrow and angles is not None and max(width, v_cache.shape[3]) <= WIDEST


def default_tile(rows: int) -> TileConfig:
    """A single program a multiprocessor is fastest with many warps."""
    return TileConfig(keys=128, warps=8 if rows <= 4 else 4, stages=2)


def decode_rotated(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, interleaved: bool, k_cache: Tensor, v_cache: Tensor,
    batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None, splits: int, config: TileConfig,
) -> Tensor:  # fmt: skip
    """`rotate_and_write`, then `decode`, for what `fits`; q is left as it was. Uses the tickets of batch.workspace."""
    rows, heads, k_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    out = torch.empty(rows, heads, v_dim, dtype=q.dtype, device=q.device)
    partial = sums = tickets = out
    if splits > 1:
        partial = torch.empty(rows, heads, splits, v_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
        if "tickets" not in batch.workspace:
            batch.workspace["tickets"] = torch.zeros(max(rows * heads, 1), dtype=torch.int32, device=q.device)
        tickets = batch.workspace["tickets"]
    group = heads // kv_heads
    decode_rotated_kernel[(rows, kv_heads, splits)](
        q, k, v, angles, batch.positions, batch.slots, k_cache, v_cache, out, batch.block_tables, batch.table_rows,
        batch.seq_lens, q if sinks is None else sinks, partial, sums, tickets, kind.scale, kind.softcap or 1.0,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(1),
        v_cache.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim,
        pairs=angles.shape[1] // 2, SIZE=k_cache.shape[1], SPLITS=splits, WINDOW=kind.window or 0,
        SOFTCAP=kind.softcap is not None, SINKS=sinks is not None, INTERLEAVED=interleaved, GROUP=group,
        M=max(16, triton.next_power_of_2(group)), N=config.keys, D=max(16, triton.next_power_of_2(k_dim)),
        DV=max(16, triton.next_power_of_2(v_dim)), KIND=product_kind(q, k_cache),
        num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
    return out
