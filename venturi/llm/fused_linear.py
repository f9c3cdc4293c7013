"""One linear layer of a small decode batch with its neighbours, by the kernel that was chosen for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from venturi.kernels.activations import gated as gated_product
from venturi.kernels.quantize import quantize_rows, scaled_product
from venturi.kernels.triton_kernels.norms import rms_norm_fp8
from venturi.kernels.triton_kernels.small_linear import SmallLinearConfig, small_linear
from venturi.kernels.triton_kernels.stream_linear import RowNorm, StreamLinearConfig, stream_linear
from venturi.llm.fused_decode import KINDS
from venturi.llm.layers.attention import Attention
from venturi.llm.layers.feed_forward import GatedMlp
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import RmsNorm
from venturi.llm.models.decoder import Decoder, DecoderLayer

TORCH = "torch"
Choice = SmallLinearConfig | StreamLinearConfig | str


@dataclass(frozen=True)
class Problem:
    """A kind of linear layer call; `rows` is 1 or a power of two from 8 on."""

    rows: int
    n: int
    k: int
    dtype: str
    norm: bool
    residual: bool
    activation: str | None

    @property
    def key(self) -> str:
        return " ".join(str(v) for v in asdict(self).values())


@dataclass(frozen=True)
class Use:
    """One layer with its neighbours."""

    layer: Linear
    norm: RmsNorm | None = None
    residual: bool = False
    activation: str | None = None


def uses(model: Decoder) -> list[Use]:
    """Every linear call of a fused decode step."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "a decoder's layers are DecoderLayers"
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention), "checked by fused_decode.refusal"
        assert isinstance(mlp, GatedMlp), "checked by fused_decode.refusal"
        assert isinstance(layer.input_layernorm, RmsNorm), "checked by fused_decode.refusal"
        assert isinstance(layer.post_attention_layernorm, RmsNorm), "checked by fused_decode.refusal"
        found += [
            Use(attention.qkv_proj, layer.input_layernorm),
            Use(attention.o_proj, residual=True),
            Use(mlp.gate_up_proj, layer.post_attention_layernorm, activation=KINDS[mlp.activation]),
            Use(mlp.down_proj, residual=True),
        ]
    assert isinstance(model.norm, RmsNorm), "checked by fused_decode.refusal"
    return [*found, Use(model.lm_head, model.norm)]


def problem(use: Use, rows: int) -> Problem:
    padded = 1 if rows == 1 else max(8, 1 << (rows - 1).bit_length())
    weight = use.layer.weight
    kind = str(weight.dtype).removeprefix("torch.")
    return Problem(padded, weight.shape[0], weight.shape[1], kind, use.norm is not None, use.residual, use.activation)


def run(choice: Choice, x: Tensor, use: Use, residual: Tensor | None, tickets: Tensor) -> Tensor:
    """Apply a layer with its neighbours the chosen way."""
    layer, norm, kind = use.layer, use.norm, x.dtype
    rest: dict[str, Any] = {
        "tickets": tickets,
        "scales": layer.scales,
        "residual": residual,
        "bias": layer.bias,
        "out_dtype": kind,
    }
    if isinstance(choice, StreamLinearConfig) and choice.inside:
        inside = None if norm is None else RowNorm(norm.weight, norm.eps, norm.offset)
        return stream_linear(x, layer.weight, choice, norm=inside, gated=use.activation, **rest)
    x_scales = None
    if layer.weight.dtype == torch.float8_e4m3fn:
        if norm is None:
            x, x_scales = quantize_rows(x)
        else:
            x, x_scales, _ = rms_norm_fp8(x, norm.weight, norm.eps, None, norm.offset)
    elif norm is not None:
        x = norm(x)[0]
    if isinstance(choice, StreamLinearConfig):
        return stream_linear(x, layer.weight, choice, x_scales=x_scales, gated=use.activation, **rest)
    if isinstance(choice, SmallLinearConfig):
        return small_linear(x, layer.weight, choice, x_scales=x_scales, gated=use.activation, **rest)
    if x_scales is None or layer.scales is None:
        y = F.linear(x, layer.weight, layer.bias)
    else:
        y = scaled_product(x, x_scales, layer.weight, layer.scales, layer.bias, kind)
    if use.activation is not None:
        y = gated_product(y, "silu" if use.activation == "silu" else "gelu_pytorch_tanh")
    return y if residual is None else y + residual
