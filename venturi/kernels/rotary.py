"""Rotary position embedding, and the write of keys and values into the paged cache that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

CacheScales = tuple[Tensor, Tensor]
"""What the codes of an int8 cache are multiplied by: of keys and of values, [blocks, block_tokens, kv_heads] fp32."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] features of each head by the angles of its token.

    Args:
        x: [tokens, heads, head_dim]. cos, sin: [tokens, pairs], fp32.
        interleaved: pair i is features (2i, 2i + 1), else (i, i + pairs).
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0 : 2 * pairs : 2].float(), x[..., 1 : 2 * pairs : 2].float()
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned.to(x.dtype)
    return turned if 2 * pairs == x.shape[-1] else torch.cat((turned, x[..., 2 * pairs :]), -1)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., dim] as int8 and a scale, fp32 [...]: x is about codes * scale. What is not finite is in the scale."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127.0
    codes = (wide / scale.clamp(min=1e-30)[..., None]).nan_to_num(0.0, 127.0, -127.0)
    return codes.round().clamp(-127, 127).to(torch.int8), scale


def write_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, scales: CacheScales | None = None
) -> None:
    """cache[slot] = value for each token; slot = block * block_tokens + offset. Mutates the caches.

    Args:
        k, v: [tokens, kv_heads, dim]. k_cache, v_cache: [blocks, block_tokens, kv_heads, dim]. slots: [tokens], int64.
        scales: of int8 caches, which get round(value / scale) with scale = max |value| / 127 of a head.
    """
    if scales is not None:
        for x, cache, scale in ((k, k_cache, scales[0]), (v, v_cache, scales[1])):
            codes, factors = quantize_heads(x)
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, codes)
            scale.view(-1, scale.shape[2]).index_copy_(0, slots, factors)
        return
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k.to(k_cache.dtype))
    if v_cache.data_ptr() != k_cache.data_ptr():
        v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v.to(v_cache.dtype))


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, interleaved: bool, scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys, write keys and values to the cache, return the queries.

    Args:
        angles: [max_positions, 2 * pairs] fp32, cosines then sines; None: no rotation.
        Others as in `rotate` and `write_cache`. On CUDA q is rotated in place.
    """
    if q.is_cuda:
        from venturi.kernels.triton_kernels.rotary import rotate_and_write as on_device

        return on_device(q, k, v, angles, positions, k_cache, v_cache, slots, interleaved, scales)
    if angles is not None:
        cos, sin = angles[positions].chunk(2, dim=-1)
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    write_cache(k, v, k_cache, v_cache, slots, scales)
    return q
