"""Normalization over the last dimension, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from venturi.kernels.quantize import ScaledRows, quantize_rows


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * (weight + offset) with s = x + residual, computed in fp32.

    Args:
        x, residual: [..., hidden], fp32/fp16/bf16. On CUDA `residual` is updated in place.
        weight: [hidden]. offset: 1.0 for models that store weight - 1.

    Returns:
        (y, s), both in x's dtype.
    """
    if x.is_cuda:
        from venturi.kernels.triton_kernels.norms import rms_norm as on_device

        return on_device(x, weight, eps, residual, offset)
    total = x if residual is None else x + residual
    if offset:
        wide = F.rms_norm(total.float(), (x.shape[-1],), weight.float() + offset, eps)
        return wide.to(x.dtype), total
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
) -> tuple[ScaledRows, Tensor]:
    """`rms_norm` of x [rows, hidden] with the result in fp8, one scale a row: one pass over memory on CUDA."""
    if x.is_cuda:
        from venturi.kernels.triton_kernels.norms import rms_norm_fp8 as on_device

        values, scales, total = on_device(x, weight, eps, residual, offset)
        return ScaledRows(values, scales), total
    y, total = rms_norm(x, weight, eps, residual, offset=offset)
    return quantize_rows(y), total


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = x + residual. Shapes as in `rms_norm`."""
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, (x.shape[-1],), weight, bias, eps), total
