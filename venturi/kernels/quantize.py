"""Rows to fp8 (e4m3) with one scale a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0


class ScaledRows(NamedTuple):
    """Rows in fp8: values [rows, n] float8_e4m3fn times scales [rows] fp32."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> ScaledRows:
    """x: [rows, n] -> (q [rows, n] float8_e4m3fn, scales [rows] fp32) with x ~ q * scales; the largest maps to 448."""
    if x.is_cuda:
        from venturi.kernels.triton_kernels.quantize import quantize_rows as on_device

        return ScaledRows(*on_device(x))
    scales = x.abs().amax(-1).float().clamp(min=1e-12) / FP8_MAX
    return ScaledRows((x.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


def scaled_product(
    x: Tensor, x_scales: Tensor, w: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x * x_scales) (w * scales)^T + bias of fp8 operands on CUDA (cuBLASLt). x: [rows, k], w: [n, k], both e4m3."""
    y = torch._scaled_mm(
        x, w.t(), scale_a=x_scales[:, None], scale_b=scales[None], out_dtype=dtype, use_fast_accum=True
    )
    return y if bias is None else y + bias
