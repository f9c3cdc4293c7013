"""Attention with masks, caches, windows and soft cap; rotary embedding; linear attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.ir.dtypes import DT
from venturi.ops.table import CONTRACT, PREVIEW, OpContext, Shapes, op
from venturi.ops.tensors import STORAGE

T = torch.Tensor


def _flops(ins: Shapes, outs: Shapes, attrs: dict[str, Any]) -> float:
    keys = ins[1][-2]
    return 4.0 * float(np.prod(ins[0], dtype=np.float64)) * keys


def split_heads(x: T, heads: int | None) -> T:
    """[B, S, H*D] → [B, H, S, D]; 4-D passes."""
    if x.dim() == 4:
        return x
    assert heads, "3-D attention inputs need the number of heads"
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: T) -> T:
    """[B, H, S, D] → [B, S, H*D]."""
    return x.transpose(1, 2).flatten(2)


def repeat_heads(x: T, heads: int) -> T:
    """Share every key/value head among heads/x.shape[1] query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@op("Attention", CONTRACT, ulps=64, flops=_flops)
def attention(
    q: T,
    k: T,
    v: T,
    mask: T | None = None,
    past_key: T | None = None,
    past_value: T | None = None,
    nonpad: T | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    ctx: OpContext | None = None,
) -> Any:
    flat = q.dim() == 3
    q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset: int | T = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    if nonpad is not None and past_key is None:
        offset = nonpad.to(q.device) - q.shape[2]
    factor = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    allowed = _allowed(q, k, offset, nonpad, is_causal, left_window_size, right_window_size)
    bias = None if mask is None else _pad_mask(mask, k.shape[2])
    outputs = 1 if ctx is None else ctx.num_outputs
    if (
        outputs < 4
        and softcap == 0.0
        and softmax_precision is None
        and q.dtype == v.dtype
        and bias is None
        and allowed is None
    ):
        y = F.scaled_dot_product_attention(q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), scale=factor)
        scores = None
    else:
        y, scores = _explicit(q, k, v, bias, allowed, factor, softcap, softmax_precision, qk_matmul_output_mode)
    y = merge_heads(y) if flat else y
    return y if outputs == 1 else (y, k, v, scores)


def _allowed(q: T, k: T, offset: int | T, nonpad: T | None, causal: int, left: int, right: int) -> T | None:
    """Boolean [B or 1, 1, Sq, Sk] of the pairs that causality, windows and padding leave, or None for all."""
    query = torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)[None, :]
    position = query + (offset if isinstance(offset, int) else offset.reshape(-1, 1, 1, 1))
    rules = []
    if causal:
        rules.append(key <= position)
    if left >= 0:
        rules.append(key >= position - left)
    if right >= 0:
        rules.append(key <= position + right)
    if nonpad is not None:
        rules.append(key < nonpad.to(q.device).reshape(-1, 1, 1, 1))
    if not rules:
        return None
    out = rules[0]
    for rule in rules[1:]:
        out = out & rule
    return out


def _pad_mask(mask: T, keys: int) -> T:
    missing = keys - mask.shape[-1]
    if missing <= 0:
        return mask
    return F.pad(mask, [0, missing], value=False if mask.dtype == torch.bool else -math.inf)


def _explicit(
    q: T,
    k: T,
    v: T,
    bias: T | None,
    allowed: T | None,
    factor: float,
    softcap: float,
    precision: int | None,
    mode: int,
) -> tuple[T, T]:
    root = math.sqrt(abs(factor))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = torch.matmul(q * root, (k * math.copysign(root, factor)).mT)
    seen = scores
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
        seen = scores if mode == 1 else seen
    if bias is not None:
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -math.inf)
        else:
            scores = scores + bias.to(scores.dtype)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    seen = scores if mode == 2 else seen
    wide = STORAGE[DT(precision)] if precision else torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.to(wide), -1)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    weights = weights.masked_fill(dead, 0.0).to(q.dtype)
    seen = weights if mode == 3 else seen
    return torch.matmul(weights.to(v.dtype), v), seen


def rotate(x: T, cos: T, sin: T, interleaved: bool) -> T:
    """Rotate the pairs of the last axis of x [..., D]; cos and sin [..., D/2] broadcast against it."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([cos * a - sin * b, sin * a + cos * b], -1)


@op("RotaryEmbedding", ulps=16)
def rotary_embedding(
    x: T,
    cos: T,
    sin: T,
    position_ids: T | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> T:
    y = x if x.dim() == 4 else split_heads(x, num_heads)
    dim = rotary_embedding_dim or y.shape[-1]
    if position_ids is not None:
        cos, sin = cos[position_ids.long()], sin[position_ids.long()]
    cos, sin = cos[:, None, :, : dim // 2], sin[:, None, :, : dim // 2]
    out = torch.cat([rotate(y[..., :dim], cos, sin, bool(interleaved)), y[..., dim:]], -1)
    return out if x.dim() == 4 else merge_heads(out)


@op("LinearAttention", ulps=64)
def linear_attention(
    q: T,
    k: T,
    v: T,
    past: T | None = None,
    decay: T | None = None,
    beta: T | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[T, T]:
    """The recurrence run token by token in fp32: S is [B, H, Dk, Dv]."""
    dtype = q.dtype
    query, key, value = (split_heads(x, h).float() for x, h in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    batch, heads, time, dk = key.shape
    state = query.new_zeros(batch, heads, dk, value.shape[-1]) if past is None else past.float()
    gate = None if decay is None else torch.exp(split_heads(decay, kv_num_heads).float())
    rate = None
    if beta is not None:
        rate = beta.float().transpose(1, 2)[..., None].expand(batch, heads, time, 1)
    factor = scale or 1.0 / math.sqrt(dk)
    outputs = []
    for t in range(time):
        kt, vt = key[:, :, t, :, None], value[:, :, t, None, :]
        if gate is not None and "gated" in update_rule:
            state = state * gate[:, :, t, :, None]
        if "delta" in update_rule:
            assert rate is not None, "delta rules need beta"
            vt = rate[:, :, t, None] * (vt - (state * kt).sum(2, keepdim=True))
        state = state + kt * vt
        outputs.append((query[:, :, t, None, :] * factor) @ repeat_heads(state, q_num_heads))
    y = torch.cat(outputs, 2) if outputs else query.new_zeros(batch, q_num_heads, 0, value.shape[-1])
    return merge_heads(y).to(dtype), state.to(dtype if past is None else past.dtype)


@op("FlexAttention", domain=PREVIEW, ulps=64)
def flex_attention(
    q: T,
    k: T,
    v: T,
    *,
    prob_mod: Callable[..., Sequence[T]] | None = None,
    scale: float | None = None,
    score_mod: Callable[..., Sequence[T]] | None = None,
    softmax_precision: int | None = None,
) -> T:
    default = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = STORAGE[DT(softmax_precision)] if softmax_precision else default
    factor = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (torch.matmul(q.to(default), k.to(default).mT) * factor).to(wide)
    scores = score_mod(scores)[0] if score_mod else scores
    weights = torch.softmax(scores, -1)
    weights = prob_mod(weights)[0] if prob_mod else weights
    return torch.matmul(weights.to(default), v.to(default)).to(q.dtype)
