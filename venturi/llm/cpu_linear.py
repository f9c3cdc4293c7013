"""Linear layers on the CPU in bf16: weights packed once, for generated code or for oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.backends.cpu.codegen.isa import Isa
from venturi.kernels.quantize import ScaledRows
from venturi.llm.cpu_code import multiplier
from venturi.llm.layers.linear import Linear, PlainMethod
from venturi.llm.models.decoder import Decoder

TILE_ROWS = 16


class GeneratedMethod:
    """Keeps only the packed weight, unless the weight is shared with the embedding."""

    name = "generated code, packed weight"
    takes_fp8 = False

    def __init__(self, isa: Isa, *, shared: bool) -> None:
        self._isa, self._shared = isa, shared

    def prepare(self, layer: Linear) -> None:
        from venturi.backends.cpu.native.rows_linear import RowsLinear

        self._linear = RowsLinear(self._isa, layer.weight.data, None if layer.bias is None else layer.bias.data)
        if not self._shared:
            layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor:
        assert isinstance(x, Tensor), "only given to methods that take it"
        return self._linear(x)


class PackedMethod:
    """oneDNN's: few rows are padded to a tile of 16. Keeps only the blocked weight, as GeneratedMethod does."""

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
    """Choose a method for plain linear layers, before `Decoder.prepare`. Weights that layers read directly stay."""
    isa = multiplier() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if isa is None and not packs(dtype, device):
        return
    for name, module in model.named_modules():
        plain = isinstance(module, Linear) and isinstance(module.method, PlainMethod)
        if plain and not name.endswith(("mlp.gate", "kv_b_proj")):
            shared = name == "lm_head" and model.spec.tied
            module.method = PackedMethod(shared=shared) if isa is None else GeneratedMethod(isa, shared=shared)
