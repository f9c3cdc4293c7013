"""Normalization over the last dimension, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = x + residual. Shapes as in `rms_norm`."""
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, (x.shape[-1],), weight, bias, eps), total
