"""Linear layers on the CPU in bf16: weights blocked once for oneDNN, few rows padded to a tile of 16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.kernels.quantize import ScaledRows
from venturi.llm.layers.linear import Linear, PlainMethod
from venturi.llm.models.decoder import Decoder

TILE_ROWS = 16


class PackedMethod:
    """Keeps only the blocked weight, unless the weight is shared with the embedding."""

    name = "oneDNN, blocked weight"
    takes_fp8 = False

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared

    def prepare(self, layer: Linear) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, TILE_ROWS)
        if not self._shared:
            layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor:
        assert isinstance(x, Tensor), "only given to methods that take it"
        rows = len(x)
        padded = F.pad(x, (0, 0, 0, TILE_ROWS - rows)) if rows < TILE_ROWS else x
        y: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self._packed, layer.bias, "none", [], "")
        return y[:rows]


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch and CPU have what PackedMethod needs."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_for_cpu(model: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    """Choose PackedMethod for plain linear layers, before `Decoder.prepare`. Weights that layers read directly stay."""
    if not packs(dtype, device):
        return
    for name, module in model.named_modules():
        plain = isinstance(module, Linear) and isinstance(module.method, PlainMethod)
        if plain and not name.endswith(("mlp.gate", "kv_b_proj")):
            module.method = PackedMethod(shared=name == "lm_head" and model.spec.tied)
