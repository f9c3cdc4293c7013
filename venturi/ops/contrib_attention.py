"""The attention family of com.microsoft, expressed through the standard Attention."""

from __future__ import annotations

import math

import torch

from venturi.ops.attention import attention, merge_heads, rotate, split_heads
from venturi.ops.table import CONTRACT, CONTRIB, OpContext, op

T = torch.Tensor


def _key_mask(mask: T | None, batch: int, keys: int) -> T | None:
    """Right-padding lengths [B], key masks [B, T] or [B, S, T] → boolean broadcastable to [B, H, S, T]."""
    if mask is None:
        return None
    if mask.dim() == 1:
        lengths = mask[:batch]
        return (torch.arange(keys, device=mask.device)[None] < lengths[:, None])[:, None, None, :]
    if mask.dim() == 2:
        return (mask != 0)[:, None, None, :]
    if mask.dim() == 3:
        return (mask != 0)[:, None]
    return mask != 0


def _combine(mask: T | None, bias: T | None, dtype: torch.dtype, fill: float) -> T | None:
    if mask is None:
        return bias
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, fill)
    return added if bias is None else added + bias


@op("Attention", CONTRACT, domain=CONTRIB, ulps=64)
def packed_attention(
    x: T,
    w: T,
    b: T | None = None,
    mask: T | None = None,
    past: T | None = None,
    bias: T | None = None,
    past_length: T | None = None,
    *,
    num_heads: int,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float | None = None,
    unidirectional: int = 0,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
) -> tuple[T, T]:
    packed = torch.matmul(x, w) if b is None else torch.matmul(x, w) + b
    third = packed.shape[-1] // 3
    q, k, v = (split_heads(p, num_heads) for p in packed.split(qkv_hidden_sizes or [third] * 3, -1))
    keys = k.shape[2] + (past.shape[3] if past is not None else 0)
    full = _combine(_key_mask(mask, x.shape[0], keys), bias, x.dtype, mask_filter_value)
    before = (past[0], past[1]) if past is not None else (None, None)
    y, key, value, _ = attention(
        q, k, v, full, *before, is_causal=unidirectional, scale=scale or None, ctx=OpContext(num_outputs=3)
    )
    return merge_heads(y), torch.stack([key, value])


@op("MultiHeadAttention", CONTRACT, domain=CONTRIB, ulps=64)
def multi_head_attention(
    q: T,
    k: T | None = None,
    v: T | None = None,
    b: T | None = None,
    mask: T | None = None,
    bias: T | None = None,
    past_key: T | None = None,
    past_value: T | None = None,
    *,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
    mask_filter_value: float = -10000.0,
) -> tuple[T, T, T]:
    if q.dim() == 5:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.dim() == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    assert k is not None, "MultiHeadAttention needs keys"
    v = k if v is None else v
    if b is not None:
        width = q.shape[-1]
        q = q + b[:width]
        k = k + b[width : 2 * width] if k.dim() == 3 else k
        v = v + b[2 * width :] if v.dim() == 3 else v
    query, key, value = (split_heads(t, num_heads) for t in (q, k, v))
    keys = key.shape[2] + (past_key.shape[2] if past_key is not None else 0)
    full = _combine(_key_mask(mask, q.shape[0], keys), bias, q.dtype, mask_filter_value)
    y, key, value, _ = attention(
        query, key, value, full, past_key, past_value,
        is_causal=unidirectional, scale=scale or None, ctx=OpContext(num_outputs=3),
    )  # fmt: skip
    return merge_heads(y), key, value


@op("GroupQueryAttention", CONTRACT, domain=CONTRIB, ulps=64)
def group_query_attention(
    q: T,
    k: T | None,
    v: T | None,
    past_key: T | None,
    past_value: T | None,
    lengths: T,
    total: T,
    cos: T | None = None,
    sin: T | None = None,
    position_ids: T | None = None,
    bias: T | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float | None = None,
    softcap: float = 0.0,
    local_window_size: int = -1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    smooth_softmax: int = 0,
) -> tuple[T, T, T]:
    """Causal attention over a padded cache; `lengths` [B] is each row's total length minus one."""
    if k is None or v is None:
        size = q.shape[-1] // (num_heads + 2 * kv_num_heads)
        q, k, v = q.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    query, key, value = split_heads(q, num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    batch, _, steps, _ = query.shape
    used = lengths.reshape(-1).long() + 1 - steps
    where = used.clamp(min=0)[:, None] + torch.arange(steps, device=q.device)[None]
    if do_rotary and cos is not None and sin is not None:
        ids = where if position_ids is None else position_ids.long()
        half = cos.shape[-1]
        query, key = (_rope(t, cos[ids], sin[ids], half, bool(rotary_interleaved)) for t in (query, key))
    if past_key is not None and past_value is not None and past_key.shape[2]:
        room = max(int(total.reshape(-1)[0]), past_key.shape[2])
        key, value = (_append(c, n, where, room) for c, n in ((past_key, key), (past_value, value)))
    position = where[:, None, :, None]
    column = torch.arange(key.shape[2], device=q.device)
    allowed = column <= position
    if local_window_size > 0:
        allowed = allowed & (column > position - local_window_size)
    full = _combine(allowed, bias, q.dtype, -math.inf)
    y = attention(query, key, value, full, scale=scale or None, softcap=softcap)
    return merge_heads(y), key, value


def _rope(x: T, cos: T, sin: T, half: int, interleaved: bool) -> T:
    turned = rotate(x[..., : 2 * half], cos[:, None], sin[:, None], interleaved)
    return torch.cat([turned, x[..., 2 * half :]], -1)


def _append(cache: T, new: T, where: T, room: int) -> T:
    out = cache.new_zeros(cache.shape[0], cache.shape[1], room, cache.shape[3])
    out[:, :, : cache.shape[2]] = cache
    return out.scatter_(2, where[:, None, :, None].expand_as(new), new)


@op("RotaryEmbedding", domain=CONTRIB, ulps=16)
def contrib_rotary_embedding(
    x: T,
    position_ids: T,
    cos: T,
    sin: T,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> T:
    dim = rotary_embedding_dim or 2 * cos.shape[-1]
    y = x if x.dim() == 4 else split_heads(x, num_heads or x.shape[-1] // dim)
    ids = position_ids.long()
    if ids.numel() == 1:
        ids = ids.reshape(1, 1) + torch.arange(y.shape[2], device=x.device)[None]
    out = _rope(y, cos[ids], sin[ids], dim // 2, bool(interleaved))
    return out if x.dim() == 4 else merge_heads(out)
