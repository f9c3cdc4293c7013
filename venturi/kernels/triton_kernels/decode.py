"""Decoding over the paged cache, split over keys: one query token a sequence.

The online softmax of FlashAttention (Dao et al. 2022); partial results are reduced as in Flash-Decoding, by the program
that finishes a (sequence, kv head) last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.rotary import CacheScales
from venturi.kernels.triton_kernels import decode_fp8
from venturi.kernels.triton_kernels.attention_parts import (
    TileConfig,
    absorb_tile,
    features,
    finish_heads,
    narrow,
    product_kind,
    score_tile,
)
from venturi.kernels.triton_kernels.launch import num_sms, options

MAX_SPLITS = 32


@triton.jit
def decode_kernel(
    q, k_cache, v_cache, k_scales, v_scales, out, tables, table_rows, seq_lens, sinks, partial, sums, tickets, scale,
    softcap, q_row, q_head, k_slot, v_slot, table_row, heads: tl.constexpr, kv_heads: tl.constexpr, k_dim: tl.constexpr,
    v_dim: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr,
    DV: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
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
    active = tl.cdiv(length - first, run)
    if split >= active:
        return
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
        key_scale, value_scale = seen, seen
        if SCALED:
            key_scale = tl.load(k_scales + slot * kv_heads + kv_head, mask=seen, other=0.0)
            value_scale = tl.load(v_scales + slot * kv_heads + kv_head, mask=seen, other=0.0)
        k_base = k_cache + slot[None, :] * k_slot + kv_head * k_dim
        keys = tl.load(k_base + column[:, None], mask=seen[None, :] & (column[:, None] < k_dim), other=0.0).to(KIND)
        k_tail = keys
        if TAIL > 0:
            tail = D + tl.arange(0, TAIL)
            k_tail = tl.load(k_base + tail[:, None], mask=seen[None, :] & (tail[:, None] < k_dim), other=0.0).to(KIND)
        scores = score_tile(q_main, q_tail, keys, k_tail, key_scale, scale, softcap, SOFTCAP, TAIL, SCALED)
        v_base = v_cache + slot[:, None] * v_slot + kv_head * v_dim
        values = tl.load(v_base + feature[None, :], mask=seen[:, None] & (feature[None, :] < v_dim), other=0.0).to(KIND)
        top, total, acc = absorb_tile(scores, values, value_scale, seen, top, total, acc, SCALED)
    own_ticket = tickets + sequence * (kv_heads * parts) + tl.program_id(1)
    finish_heads(acc, top, total, out, partial, sums, sinks, own_ticket, split, active, sequence * heads + head, head,
                 row_in, v_dim, SPLITS, SINKS, M, DV)  # fmt: skip


def decode_config(rows: int, kv_heads: int, device: torch.device) -> TileConfig:
    """Few programs: long tiles and many warps for latency; many: shorter tiles, more of them at once."""
    if rows * kv_heads < num_sms(device.index or 0):
        return TileConfig(keys=128, warps=8, stages=2)
    return TileConfig(keys=64, warps=4, stages=3)


def num_splits(rows: int, kv_heads: int, max_keys: int, device: torch.device, keys: int = 128) -> int:
    """Parts that the keys are cut into, so that all multiprocessors have work and no part is shorter than `keys`."""
    programs = max(1, rows * kv_heads)
    wanted = triton.cdiv(2 * num_sms(device.index or 0), programs)
    longest = max(1, max_keys // keys)
    return min(MAX_SPLITS, 1 << (min(wanted, longest).bit_length() - 1))


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None,
    splits: int, config: TileConfig | None = None, out: Tensor | None = None, scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """One query token for each of the first len(q) sequences, into `out` if given.

    Allocates its partial results; tickets are in batch.workspace, zero between calls.
    """
    rows, heads, k_dim = q.shape
    kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    if out is None:
        out = torch.empty(rows, heads, v_dim, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    wide, tail = features(k_dim)
    partial = sums = out
    if splits > 1:
        partial = torch.empty(rows, heads, splits, v_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
        if "tickets" not in batch.workspace:
            batch.workspace["tickets"] = torch.zeros(max(rows * heads, 1), dtype=torch.int32, device=q.device)
    if decode_fp8.fits(q, k_cache, v_cache):
        tile = config or decode_fp8.default_tile(rows * kv_heads < num_sms(q.device.index or 0))
        decode_fp8.decode_fp8(q, k_cache, v_cache, batch, kind, sinks, splits, tile, out, partial, sums)
        return out
    if config is None:
        config = decode_config(rows, kv_heads, q.device) if wide <= 128 else TileConfig(keys=32, stages=2)
    m = max(16, min(triton.next_power_of_2(group), 64 if wide <= 128 else 16))
    decode_kernel[(rows, kv_heads * triton.cdiv(group, m), splits)](
        q, k_cache, v_cache, *(scales or (q, q)), out, batch.block_tables, batch.table_rows, batch.seq_lens,
        q if sinks is None else sinks, partial, sums,
        batch.workspace.get("tickets", out), kind.scale, kind.softcap or 1.0, q.stride(0), q.stride(1),
        k_cache.stride(1), v_cache.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads,
        k_dim=k_dim, v_dim=v_dim, SIZE=k_cache.shape[1], SPLITS=splits, WINDOW=kind.window or 0,
        SOFTCAP=kind.softcap is not None, SINKS=sinks is not None, GROUP=group,
        M=m, N=config.keys, D=wide, TAIL=tail, DV=triton.next_power_of_2(v_dim), KIND=product_kind(q, k_cache),
        SCALED=scales is not None, num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
    return out
