"""Probes for oneDNN's fused primitives inside torch. They are not public API: used only where a trial call works."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_fused_conv() -> bool:
    """Whether torch.ops.mkldnn._convolution_pointwise and its weight reorder run here."""
    try:
        x = torch.zeros(1, 4, 4, 4).to(memory_format=torch.channels_last)
        w = torch.zeros(4, 4, 1, 1)
        packed = torch.ops.mkldnn._reorder_convolution_weight(w, [0, 0], [1, 1], [1, 1], 1, [1, 4, 4, 4])
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
        return bool(y.shape == (1, 4, 4, 4))
    except (RuntimeError, AttributeError):
        return False


@functools.cache
def has_fused_linear() -> bool:
    """Whether torch.ops.mkldnn._linear_pointwise and its weight reorder run here."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(4, 4), 2)
        y = torch.ops.mkldnn._linear_pointwise(torch.zeros(2, 4), packed, None, "relu", [], "")
        return bool(y.shape == (2, 4))
    except (RuntimeError, AttributeError):
        return False


@functools.cache
def keeps_nan(attr: str, scalars: tuple[float, ...], algorithm: str) -> bool:
    """Whether the post-op answers NaN with NaN, as the operator's reference does. oneDNN's ReLU gives 0."""
    if not has_fused_linear():
        return False
    x = torch.full((2, 4), float("nan"))
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.eye(4), 2)
    y = torch.ops.mkldnn._linear_pointwise(x, packed, None, attr, list(scalars), algorithm)
    return bool(torch.isnan(y).all())


@functools.cache
def pairs_channels_cleanly(dtype: torch.dtype) -> bool:
    """Whether an infinity that follows an odd number of channels stays out of their products.

    Without a matrix unit, oneDNN multiplies bf16 channels in pairs: the last one's pair is the next pixel's first,
    times a weight of 0, which makes NaN of infinity.
    """
    if not has_fused_conv():
        return False
    x = torch.ones(1, 1, 1, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[..., 1::2] = float("inf")
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        torch.ones(8, 1, 1, 1, dtype=dtype), [0, 0], [1, 1], [1, 1], 1, [1, 1, 1, 8]
    )
    y = torch.ops.mkldnn._convolution_pointwise(x, packed, None, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    return bool(y[..., 0::2].isfinite().all() and y[..., 1::2].isinf().all())


@functools.cache
def computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes natively in this type on this CPU."""
    if dtype == torch.float32:
        return bool(torch.backends.mkldnn.is_available())
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
