"""Normalizations. Half-precision inputs accumulate in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from venturi.ops.table import CONTRIB, REDUCE, OpContext, op
from venturi.ops.tensors import widen

T = torch.Tensor


@op("BatchNormalization", ulps=32)
def batch_normalization(
    x: T,
    scale: T,
    bias: T,
    mean: T,
    var: T,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if not training_mode:
        factor = (
            scale.float() * torch.rsqrt(var.float() + epsilon)
            if scale.dtype != torch.float64
            else scale * torch.rsqrt(var + epsilon)
        )
        shift = bias - mean * factor
        y = widen(x) * factor.reshape(shape) + shift.reshape(shape)
        return y.to(x.dtype)
    axes = [0, *range(2, x.dim())]
    batch_var, batch_mean = torch.var_mean(x, axes, correction=0)
    y = batch_normalization(x, scale, bias, batch_mean, batch_var, epsilon=epsilon)
    running = [old * momentum + new * (1 - momentum) for old, new in ((mean, batch_mean), (var, batch_var))]
    return y, running[0].to(mean.dtype), running[1].to(var.dtype)


@op("InstanceNormalization", REDUCE, ulps=32)
def instance_normalization(x: T, scale: T, bias: T, *, epsilon: float = 1e-5) -> T:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    var, mean = torch.var_mean(widen(x), list(range(2, x.dim())), correction=0, keepdim=True)
    return ((widen(x) - mean) * torch.rsqrt(var + epsilon) * scale.reshape(shape) + bias.reshape(shape)).to(x.dtype)


@op("LayerNormalization", REDUCE, ulps=32)
def layer_normalization(
    x: T,
    scale: T,
    bias: T | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    ctx: OpContext | None = None,
) -> Any:
    axis %= max(x.dim(), 1)
    dims = list(x.shape[axis:])
    if (
        (ctx is None or ctx.num_outputs == 1)
        and list(scale.shape) == dims
        and (bias is None or bias.shape == scale.shape)
    ):
        return F.layer_norm(x, dims, scale, bias, epsilon)
    wide = x.float() if stash_type == 1 else widen(x)
    axes = list(range(axis, x.dim()))
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    y = y if bias is None else y + bias
    return y.to(x.dtype), mean, inverse


@op("RMSNormalization", REDUCE, ulps=32)
def rms_normalization(x: T, scale: T, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> T:
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 and x.dtype != torch.float64 else widen(x)
    y = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (y.to(x.dtype) * scale).to(scale.dtype)


op("SimplifiedLayerNormalization", REDUCE, ulps=32)(rms_normalization)


@op("GroupNormalization", REDUCE, ulps=32)
def group_normalization(x: T, scale: T, bias: T, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> T:
    return F.group_norm(widen(x), num_groups, widen(scale), widen(bias), epsilon).to(x.dtype)


@op("MeanVarianceNormalization", REDUCE, ulps=32)
def mean_variance_normalization(x: T, *, axes: list[int] | None = None) -> T:
    dims = axes or [0, 2, 3]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


@op("LpNormalization", REDUCE, ulps=32)
def lp_normalization(x: T, *, axis: int = -1, p: int = 2) -> T:
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@op("LRN", REDUCE, ulps=32)
def lrn(x: T, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> T:
    squares = F.pad(x.square().flatten(2)[:, None], [0, 0, (size - 1) // 2, size // 2])
    total = squares[:, 0].unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (bias + alpha / size * total).pow(beta)


def _skip(x: T, skip: T, bias: T | None) -> T:
    total = x + skip
    return total if bias is None else total + bias


@op("SkipLayerNormalization", REDUCE, domain=CONTRIB, ulps=32)
def skip_layer_normalization(
    x: T, skip: T, gamma: T, beta: T | None = None, bias: T | None = None, *, epsilon: float = 1e-12
) -> tuple[T, T | None, T | None, T]:
    total = _skip(x, skip, bias)
    return F.layer_norm(total, [x.shape[-1]], gamma, beta, epsilon), None, None, total


@op("SkipSimplifiedLayerNormalization", REDUCE, domain=CONTRIB, ulps=32)
def skip_simplified_layer_normalization(
    x: T, skip: T, gamma: T, bias: T | None = None, *, epsilon: float = 1e-5
) -> tuple[T, T | None, T | None, T]:
    total = _skip(x, skip, bias)
    return rms_normalization(total, gamma, epsilon=epsilon), None, None, total


@op("EmbedLayerNormalization", REDUCE, domain=CONTRIB, ulps=32)
def embed_layer_normalization(
    ids: T,
    segments: T | None,
    words: T,
    positions: T,
    segment_table: T | None,
    gamma: T,
    beta: T,
    mask: T | None = None,
    position_ids: T | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> tuple[T, T, T]:
    where = torch.arange(ids.shape[1], device=ids.device)[None] if position_ids is None else position_ids
    total = words[ids.long()] + positions[where.long()]
    if segments is not None and segment_table is not None:
        total = total + segment_table[segments.long()]
    count = torch.zeros(ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1).to(torch.int32)
    return F.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon), count, total
