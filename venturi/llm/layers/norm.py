"""Normalization layers. `forward(x, residual)` returns (normalized sum, sum): one memory pass for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from venturi.kernels.norms import layer_norm, rms_norm, rms_norm_fp8
from venturi.kernels.quantize import ScaledRows
from venturi.llm.models.spec import NormKind


class RmsNorm(nn.Module):
    """offset 1 for checkpoints that store weight - 1 (Gemma)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, residual, offset=self.offset)


def norm_for(
    block: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None
) -> tuple[Tensor | ScaledRows, Tensor]:
    """`norm(x, residual)` as input of `block`: in fp8 where the block's only reader multiplies in fp8 on CUDA."""
    reader = getattr(block, "reader", None)
    if isinstance(norm, RmsNorm) and x.is_cuda and reader is not None and reader.method.takes_fp8:
        return rms_norm_fp8(x, norm.weight, norm.eps, residual, offset=norm.offset)
    return norm(x, residual)  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


def make_norm(kind: NormKind, size: int, eps: float) -> RmsNorm | LayerNorm:
    if kind == "layer":
        return LayerNorm(size, eps)
    return RmsNorm(size, eps, 1.0 if kind == "rms+1" else 0.0)
