"""Decoding over an fp8 cache at the speed of memory: the cache is read as words of four numbers.

Tensor cores want pairs of neighbours along the summed dimension in a register, and fp8 has no instruction that
transposes while it loads. Numbers 4w + j of all words w therefore form matrix j of four, a byte permutation and one
conversion away; queries, keys, values and results are cut the same way, and four small products give the same sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.triton_kernels.attention_parts import TileConfig, finish_heads, narrow, scaled_scores, weigh_tile
from venturi.kernels.triton_kernels.launch import options

_WIDEN = tl.constexpr("""{
.reg .b32 low, high;
.reg .b16 a, b, c, d;
prmt.b32 low, $4, $5, 0x5140;
prmt.b32 high, $4, $5, 0x7362;
mov.b32 {a, b}, low;
mov.b32 {c, d}, high;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
cvt.rn.f16x2.e4m3x2 $2, c;
cvt.rn.f16x2.e4m3x2 $3, d;
}""")


@triton.jit
def _widen_byte(words, J: tl.constexpr):
    """Byte J of int32 words, an e4m3 number, as fp16: its bits moved and the exponent's bias corrected."""
    byte = (words >> (8 * J)) & 0xFF
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value.to(tl.float32)).to(tl.float16)


@triton.jit
def widen(words, ASM: tl.constexpr):
    """The four e4m3 numbers of every int32 word as four fp16 tensors."""
    if ASM:
        return tl.inline_asm_elementwise(
            _WIDEN, "=r,=r,=r,=r,r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    return _widen_byte(words, 0), _widen_byte(words, 1), _widen_byte(words, 2), _widen_byte(words, 3)


@triton.jit
def block_offsets(table, at, end, block_words, SIZE: tl.constexpr, N: tl.constexpr):
    """For the N tokens from `at` (a multiple of N): where their blocks begin in the cache. `end` bounds the reading."""
    if SIZE >= N:
        return tl.load(table + at // SIZE).to(tl.int64) * block_words + tl.zeros([N], tl.int64)
    which = tl.arange(0, N) // SIZE
    offset = tl.load(table + at // SIZE).to(tl.int64) * block_words + tl.zeros([N], tl.int64)
    for i in tl.static_range(1, N // SIZE):
        block = tl.load(table + at // SIZE + i, mask=at + i * SIZE < end, other=0).to(tl.int64)
        offset = tl.where(which == i, block * block_words, offset)
    return offset


@triton.jit
def decode_fp8_kernel(
    q, k_words, v_words, out, tables, table_rows, seq_lens, sinks, partial, sums, tickets, scale, softcap,
    q_row, q_head, k_slot, v_slot, table_row, heads: tl.constexpr, kv_heads: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, kv head, split); see `decode_kernel`. k_slot and v_slot are counted in words."""
    W: tl.constexpr = DIM // 4
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
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
    member, word, key = tl.arange(0, M), tl.arange(0, W), tl.arange(0, N)
    row_in = member < GROUP
    head = kv_head * GROUP + member
    q_at = q + sequence * q_row + head[:, None] * q_head + word[None, :] * 4
    q0 = narrow(tl.load(q_at, mask=row_in[:, None], other=0.0), tl.float16)
    q1 = narrow(tl.load(q_at + 1, mask=row_in[:, None], other=0.0), tl.float16)
    q2 = narrow(tl.load(q_at + 2, mask=row_in[:, None], other=0.0), tl.float16)
    q3 = narrow(tl.load(q_at + 3, mask=row_in[:, None], other=0.0), tl.float16)
    inside = key % SIZE
    if SIZE >= N:
        inside = key
    k_at = k_words + kv_head * W + (inside * k_slot)[None, :] + word[:, None]
    v_at = v_words + kv_head * W + (inside * v_slot)[:, None] + word[None, :]
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    a0 = tl.zeros([M, W], tl.float32)
    a1 = tl.zeros([M, W], tl.float32)
    a2 = tl.zeros([M, W], tl.float32)
    a3 = tl.zeros([M, W], tl.float32)
    for at in range(start, end, N):
        seen = at + key < end
        if WINDOW > 0:
            seen = seen & (at + key >= length - WINDOW)
        ahead = at % SIZE if SIZE > N else 0
        k_off = block_offsets(table, at, end, SIZE * k_slot, SIZE, N) + ahead * k_slot
        k0, k1, k2, k3 = widen(tl.load(k_at + k_off[None, :], mask=seen[None, :], other=0), ASM)
        scores = tl.dot(q0, k0, input_precision="ieee")
        scores = tl.dot(q1, k1, scores, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee")
        scores = tl.dot(q3, k3, scores, input_precision="ieee")
        scores = scaled_scores(scores, scale, softcap, SOFTCAP)
        weight, fade, top, total = weigh_tile(scores, seen, top, total)
        part = weight.to(tl.float16)
        v_off = block_offsets(table, at, end, SIZE * v_slot, SIZE, N) + ahead * v_slot
        v0, v1, v2, v3 = widen(tl.load(v_at + v_off[:, None], mask=seen[:, None], other=0), ASM)
        a0 = tl.dot(part, v0, a0 * fade[:, None], input_precision="ieee")
        a1 = tl.dot(part, v1, a1 * fade[:, None], input_precision="ieee")
        a2 = tl.dot(part, v2, a2 * fade[:, None], input_precision="ieee")
        a3 = tl.dot(part, v3, a3 * fade[:, None], input_precision="ieee")
    acc = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [M, DIM])
    finish_heads(acc, top, total, out, partial, sums, sinks, tickets + sequence * kv_heads + kv_head, split,
                 active, sequence * heads + head, head, row_in, DIM, SPLITS, SINKS, M, DIM)  # fmt: skip


def fits(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """An fp8 cache whose heads are 64 or 128 wide, read by at most 32 query heads each."""
    width, group = k_cache.shape[3], q.shape[1] // k_cache.shape[2]
    return k_cache.dtype == torch.float8_e4m3fn and width == v_cache.shape[3] and width in (64, 128) and group <= 32


def default_tile(few: bool) -> TileConfig:
    """`few` programs: long tiles and many warps for latency; else small programs with many loads in flight."""
    return TileConfig(keys=128, warps=8, stages=2) if few else TileConfig(keys=64, warps=2, stages=6)


def decode_fp8(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None,
    splits: int, config: TileConfig, out: Tensor, partial: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """As `decode.decode`, for what `fits`; partial and sums are its buffers."""
    rows, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    k_words, v_words = k_cache.view(torch.int32), v_cache.view(torch.int32)
    decode_fp8_kernel[(rows, kv_heads, splits)](
        q, k_words, v_words, out, batch.block_tables, batch.table_rows, batch.seq_lens, q if sinks is None else sinks,
        partial, sums, batch.workspace.get("tickets", out), kind.scale, kind.softcap or 1.0, q.stride(0), q.stride(1),
        k_words.stride(1), v_words.stride(1), batch.block_tables.stride(0), heads=heads, kv_heads=kv_heads,
        SIZE=k_cache.shape[1], SPLITS=splits, WINDOW=kind.window or 0, SOFTCAP=kind.softcap is not None,
        SINKS=sinks is not None, GROUP=group, M=max(16, triton.next_power_of_2(group)), N=config.keys, DIM=width,
        ASM=q.is_cuda, num_warps=config.warps, num_stages=config.stages, **options(q),
    )  # fmt: skip
