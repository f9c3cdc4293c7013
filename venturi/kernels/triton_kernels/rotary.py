"""Rotation of queries and keys and the write to the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.rotary import CacheScales
from venturi.kernels.triton_kernels.launch import options


@triton.jit
def turn(x, row, head_stride, angles, position, pairs: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
         INTERLEAVED: tl.constexpr, inside):  # fmt: skip
    """Load a tile of heads and return both rotated halves, [HEADS, PAIRS] each, fp32."""
    pair = tl.arange(0, PAIRS)
    cos = tl.load(angles + position * 2 * pairs + pair, mask=pair < pairs, other=0.0)[None, :]
    sin = tl.load(angles + position * 2 * pairs + pairs + pair, mask=pair < pairs, other=0.0)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    if INTERLEAVED:
        first = x + row + head * head_stride + 2 * pair[None, :]
        second = first + 1
    else:
        first = x + row + head * head_stride + pair[None, :]
        second = first + pairs
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate_queries(
    q, token, first, q_stride, q_head, num_q, angles, position, pairs: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (first + tl.arange(0, HEADS)[:, None] < num_q) & (pair < pairs)
    row = token * q_stride + first * q_head
    a, b = turn(q, row, q_head, angles, position, pairs, HEADS, PAIRS, INTERLEAVED, inside)
    head = q + row + tl.arange(0, HEADS)[:, None] * q_head
    if INTERLEAVED:
        tl.store(head + 2 * pair, a.to(q.dtype.element_ty), mask=inside)
        tl.store(head + 2 * pair + 1, b.to(q.dtype.element_ty), mask=inside)
    else:
        tl.store(head + pair, a.to(q.dtype.element_ty), mask=inside)
        tl.store(head + pairs + pair, b.to(q.dtype.element_ty), mask=inside)


@triton.jit
def write_keys(
    k, first, k_head, num_kv, angles, position, target, k_dim: tl.constexpr, pairs: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, K_DIM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, HEADS)[:, None]
    to = target + head * k_dim
    column = tl.arange(0, K_DIM)[None, :]
    rest = (head < num_kv) & (column < k_dim)
    if ROTATE:
        pair = tl.arange(0, PAIRS)[None, :]
        inside = (head < num_kv) & (pair < pairs)
        a, b = turn(k, first * k_head, k_head, angles, position, pairs, HEADS, PAIRS, INTERLEAVED, inside)
        a = a.to(k.dtype.element_ty).to(target.dtype.element_ty)
        b = b.to(k.dtype.element_ty).to(target.dtype.element_ty)
        if INTERLEAVED:
            tl.store(to + 2 * pair, a, mask=inside)
            tl.store(to + 2 * pair + 1, b, mask=inside)
        else:
            tl.store(to + pair, a, mask=inside)
            tl.store(to + pairs + pair, b, mask=inside)
        rest = rest & (column >= 2 * pairs)
    if not ROTATE or 2 * pairs < k_dim:
        value = tl.load(k + head * k_head + column, mask=rest, other=0.0)
        tl.store(to + column, value.to(target.dtype.element_ty), mask=rest)


@triton.jit
def rotate_and_write_kernel(
    q, k, v, angles, positions, slots, k_cache, v_cache, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    k_slot, v_slot, num_q, num_kv, k_dim: tl.constexpr, v_dim: tl.constexpr, pairs: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, WRITE_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, group): groups of HEADS query heads rotate in place, then groups of kv heads go to the cache."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + token)
    query_groups = tl.cdiv(num_q, HEADS)
    if group < query_groups:
        rotate_queries(
            q, token, group * HEADS, q_stride, q_head, num_q, angles, position, pairs, HEADS, PAIRS, INTERLEAVED
        )
    else:
        first = (group - query_groups) * HEADS
        slot = tl.load(slots + token)
        write_keys(k + token * k_stride, first, k_head, num_kv, angles, position, k_cache + slot * k_slot, k_dim, pairs,
                   HEADS, PAIRS, K_DIM, ROTATE, INTERLEAVED)  # fmt: skip
        if WRITE_V:
            head, column = first + tl.arange(0, HEADS)[:, None], tl.arange(0, V_DIM)[None, :]
            inside = (head < num_kv) & (column < v_dim)
            value = tl.load(v + token * v_stride + head * v_head + column, mask=inside, other=0.0)
            tl.store(v_cache + slot * v_slot + head * v_dim + column, value.to(v_cache.dtype.element_ty), mask=inside)


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, interleaved: bool, scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """See `venturi.kernels.rotary.rotate_and_write`. q is rotated in place; features of a head are contiguous. Into an
    int8 cache in two launches."""
    if scales is not None:
        return _quantized(q, k, v, angles, positions, k_cache, v_cache, slots, interleaved, scales)
    tokens, num_q = q.shape[:2]
    num_kv, k_dim, v_dim = k.shape[1], k.shape[2], v.shape[2]
    pairs = 0 if angles is None else angles.shape[1] // 2
    heads = 8 if tokens > 64 else 2
    groups = (triton.cdiv(num_q, heads) if angles is not None else 0) + triton.cdiv(num_kv, heads)
    if not tokens:
        return q
    rotate_and_write_kernel[(tokens, groups)](
        q, k, v, k if angles is None else angles, positions, slots, k_cache, v_cache,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_cache.stride(1), v_cache.stride(1), 0 if angles is None else num_q, num_kv,
        k_dim=k_dim, v_dim=v_dim, pairs=pairs, HEADS=heads, PAIRS=triton.next_power_of_2(max(pairs, 1)),
        K_DIM=triton.next_power_of_2(k_dim), V_DIM=triton.next_power_of_2(v_dim), ROTATE=angles is not None,
        INTERLEAVED=interleaved, WRITE_V=v_cache.data_ptr() != k_cache.data_ptr(), num_warps=4 if tokens > 64 else 1,
        **options(q),
    )  # fmt: skip
    return q


@triton.jit
def write_int8_kernel(
    k, v, k_cache, v_cache, k_scales, v_scales, slots, k_stride, k_head, v_stride, v_head, k_slot, v_slot, num_kv,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, group of heads, keys or values): codes, and the scale of each head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < num_kv)[:, None] & (column < DIM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + token)
    if tl.program_id(2) == 0:
        x = tl.load(k + token * k_stride + head[:, None] * k_head + column, mask=inside, other=0.0)
        to, scales = k_cache + slot * k_slot, k_scales
    else:
        x = tl.load(v + token * v_stride + head[:, None] * v_head + column, mask=inside, other=0.0)
        to, scales = v_cache + slot * v_slot, v_scales
    x = x.to(tl.float32)
    scale = tl.max(tl.abs(x), 1) / 127.0
    spoiled = tl.max((x != x).to(tl.int32), 1) > 0
    codes = x / tl.maximum(scale, 1e-30)[:, None]
    codes = tl.where(
        (tl.abs(codes) <= 128.0) & (spoiled[:, None] == 0), tl.minimum(tl.maximum(codes, -127.0), 127.0), 0.0
    )
    nearest = (codes + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    tl.store(to + head[:, None] * DIM + column, nearest.to(tl.int8), mask=inside)
    tl.store(scales + slot * num_kv + head, tl.where(spoiled, float("nan"), scale), mask=head < num_kv)


def _quantized(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, interleaved: bool, scales: CacheScales,
) -> Tensor:  # fmt: skip
    tokens, num_kv, dim = k.shape
    if angles is not None:
        turned = torch.empty(1, tokens, num_kv, dim, dtype=k.dtype, device=k.device)
        places = torch.arange(tokens, device=k.device)
        q = rotate_and_write(q, k, v, angles, positions, turned, turned, places, interleaved)
        k = turned[0]
    heads = min(8, triton.next_power_of_2(num_kv))
    if tokens:
        write_int8_kernel[(tokens, triton.cdiv(num_kv, heads), 2)](
            k, v, k_cache, v_cache, *scales, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_cache.stride(1), v_cache.stride(1), num_kv, DIM=dim, COLUMNS=triton.next_power_of_2(dim), HEADS=heads,
            num_warps=1, **options(k),
        )  # fmt: skip
    return q
