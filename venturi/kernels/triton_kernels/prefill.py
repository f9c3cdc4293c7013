"""Prefill over the paged cache: tiles of queries, each over all keys it may see (FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.rotary import CacheScales
from venturi.kernels.triton_kernels.attention_parts import TileConfig, features, narrow, product_kind, score_tile
from venturi.kernels.triton_kernels.launch import options


@triton.jit
def prefill_kernel(
    q, k_cache, v_cache, k_scales, v_scales, out, tables, table_rows, query_starts, seq_lens, tile_seq, tile_start,
    sinks, scale, softcap, q_row, q_head, k_slot, v_slot, table_row, heads: tl.constexpr, kv_heads: tl.constexpr,
    k_dim: tl.constexpr, v_dim: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
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
        key_scale, value_scale = present, present
        if SCALED:
            key_scale = tl.load(k_scales + slot * kv_heads + kv_head, mask=present, other=0.0)
            value_scale = tl.load(v_scales + slot * kv_heads + kv_head, mask=present, other=0.0)
        k_base = k_cache + slot[None, :] * k_slot + kv_head * k_dim
        keys = tl.load(k_base + column[:, None], mask=present[None, :] & (column[:, None] < k_dim), other=0.0).to(KIND)
        k_tail = keys
        if TAIL > 0:
            tail = D + tl.arange(0, TAIL)
            k_tail = tl.load(k_base + tail[:, None], mask=present[None, :] & (tail[:, None] < k_dim), other=0.0).to(
                KIND
            )
        scores = score_tile(q_main, q_tail, keys, k_tail, key_scale, scale, softcap, SOFTCAP, TAIL, SCALED)
        seen = place[None, :] <= own[:, None]
        if WINDOW > 0:
            seen = seen & (place[None, :] > own[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        if SCALED:
            weight = weight * value_scale[None, :]
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


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
    sinks: Tensor | None,
    config: TileConfig | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    """Any number of query tokens a sequence."""
    tokens, heads, k_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    out = torch.empty(tokens, heads, v_dim, dtype=q.dtype, device=q.device)
    wide, tail = features(k_dim)
    config = config or prefill_config(k_dim)
    tile_seq, tile_start = batch.workspace["tile_seq"], batch.workspace["tile_start"]
    if not len(tile_seq):
        return out
    prefill_kernel[(len(tile_seq), heads)](
        q, k_cache, v_cache, *(scales or (q, q)), out, batch.block_tables, batch.table_rows, batch.query_starts,
        batch.seq_lens, tile_seq, tile_start,
        q if sinks is None else sinks, kind.scale, kind.softcap or 1.0, q.stride(0), q.stride(1), k_cache.stride(1),
        v_cache.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim,
        SIZE=k_cache.shape[1], WINDOW=kind.window or 0, SOFTCAP=kind.softcap is not None, SINKS=sinks is not None,
        M=config.queries, N=config.keys, D=wide, TAIL=tail, DV=triton.next_power_of_2(v_dim),
        KIND=product_kind(q, k_cache), SCALED=scales is not None,
        num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
    return out


def prefill_config(k_dim: int) -> TileConfig:
    """The prefill kernel's tile; `tiles` must be made with its number of queries."""
    return TileConfig(64, 128, 4, 2) if k_dim <= 128 else TileConfig(32, 32, 4, 2)


def tiles(
    query_starts: list[int], rows: int, skip: int = 0, without: Container[int] = ()
) -> tuple[list[int], list[int]]:
    """(sequence, first query) of every tile of `rows` queries, from sequence `skip` on and not of those in `without`; a
    sequence's last tile, which takes longest, comes first."""
    found = [
        (i, at)
        for i, (a, b) in enumerate(pairwise(query_starts))
        for at in reversed(range(0, b - a, rows))
        if i >= skip and i not in without
    ]
    return [i for i, _ in found], [at for _, at in found]
