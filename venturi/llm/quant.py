"""FP8 weights (e4m3, one scale per output row), made while loading. A LinearMethod: the layers do not know.

On CUDA activations are quantized per token and the product is fp8: cuBLASLt here, our kernels for small decode batches
(`fused_linear.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from venturi.kernels.quantize import ScaledRows, quantize_rows, scaled_product
from venturi.llm.layers.linear import Linear
from venturi.llm.models.decoder import Decoder


class Fp8Method:
    """weight: [out, in] e4m3; scales: [out] fp32. On the CPU the product is computed in the activation's type."""

    name = "fp8 row-wise"
    takes_fp8 = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def prepare(self, layer: Linear) -> None:
        """Weights that were saved quantized have their scales."""
        if layer.scales is not None:
            return
        packed, scales = quantize_rows(layer.weight.data)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.scales = scales

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor:
        assert layer.scales is not None, "prepare made the scales"
        if isinstance(x, ScaledRows):
            return scaled_product(*x, layer.weight, layer.scales, layer.bias, self._dtype)
        if not x.is_cuda:
            y = nn.functional.linear(x, layer.weight.to(x.dtype)) * layer.scales.to(x.dtype)
            return y if layer.bias is None else y + layer.bias
        rows, scales = quantize_rows(x)
        return scaled_product(rows, scales, layer.weight, layer.scales, layer.bias, x.dtype)


def apply_quantization(model: Decoder, quant: str | None, dtype: torch.dtype) -> None:
    """Choose the linear methods of a model of `dtype`, before `Decoder.prepare`."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_quantized(name, module, model, quant):
            module.method = Fp8Method(dtype)


def is_quantized(name: str, layer: Linear, model: Decoder, quant: str | None) -> bool:
    """Heads tied to the embedding, routers and odd sizes stay as they are."""
    if quant is None:
        return False
    router = name.endswith("mlp.gate")
    latent = name.endswith("kv_b_proj")
    odd = bool(layer.in_features % 16 or layer.out_features % 16)
    return not (router or latent or odd or (name == "lm_head" and model.spec.tied))
