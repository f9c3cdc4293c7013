"""Rows to fp8 (e4m3) with one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [rows, n] -> (q [rows, n] float8_e4m3fn, scales [rows] fp32) with x ~ q * scales; the largest maps to 448."""
    if x.is_cuda:
        from venturi.kernels.triton_kernels.quantize import quantize_rows as on_device

        return on_device(x)
    scales = x.abs().amax(-1).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales
