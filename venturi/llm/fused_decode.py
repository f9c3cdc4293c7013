"""Decode steps of few rows with everything fused into the linear layers: five kernels and attention a layer.

    norm+qkv | rotate+write | attention | out+residual | norm+gate/up+act | down+residual

Works for decoders whose layers are plain: RMS norms before attention and a gated feed-forward, bf16, fp16 or fp8
weights. `explain` and the graphs say where it is used; everything else goes through the modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from venturi.kernels.attention import AttentionBatch
from venturi.llm.layers.attention import Attention, LayerCache
from venturi.llm.layers.feed_forward import GatedMlp
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import RmsNorm
from venturi.llm.models.decoder import Decoder, DecoderLayer

KINDS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
MAX_ROWS = 64
# (x, layer, norm, residual, activation) -> y: the fused linear that the tuner chose for this layer and number of rows
FusedLinear = Callable[[Tensor, Linear, RmsNorm | None, Tensor | None, str | None], Tensor]


def refusal(model: Decoder) -> str | None:
    """Why the fused path cannot run this model; None when it can."""
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "a decoder's layers are DecoderLayers"
        if layer.sandwich or not isinstance(layer.input_layernorm, RmsNorm):
            return "norms other than RMS before each part"
        if not isinstance(layer.self_attn, Attention):
            return "latent attention"
        if not isinstance(layer.mlp, GatedMlp) or layer.mlp.activation not in KINDS:
            return "feed-forward other than gated SiLU or GELU"
    if model.lm_head.weight.dtype == torch.float32:
        return "fp32 weights"
    return None


class FusedDecode:
    """Runs decode steps of a model. Capture-safe; allocates its results.

    Args:
        linear: applies a layer with its neighbours fused (see FusedLinear).
    """

    def __init__(self, model: Decoder, linear: FusedLinear) -> None:
        self.model, self.linear = model, linear

    def logits(self, stream: Tensor, batch: AttentionBatch, caches: list[LayerCache]) -> Tensor:
        """[rows, hidden] embeddings of a token a sequence -> [rows, vocab] logits."""
        model = self.model
        for layer, angles, cache in zip(model.layers, model.angles, caches):
            assert isinstance(layer, DecoderLayer), "a decoder's layers are DecoderLayers"
            stream = self._layer(layer, stream, angles, cache, batch)
        assert isinstance(model.norm, RmsNorm), "checked by `refusal`"
        return model.cap(self.linear(stream, model.lm_head, model.norm, None, None))

    def _layer(
        self, layer: DecoderLayer, stream: Tensor, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention), "checked by `refusal`"
        assert isinstance(mlp, GatedMlp), "checked by `refusal`"
        assert isinstance(layer.input_layernorm, RmsNorm), "checked by `refusal`"
        assert isinstance(layer.post_attention_layernorm, RmsNorm), "checked by `refusal`"
        qkv = self.linear(stream, attention.qkv_proj, layer.input_layernorm, None, None)
        out = attention.attend(qkv, angles, cache, batch)
        stream = self.linear(out.flatten(1), attention.o_proj, None, stream, None)
        inner = self.linear(stream, mlp.gate_up_proj, layer.post_attention_layernorm, None, KINDS[mlp.activation])
        return self.linear(inner, mlp.down_proj, None, stream, None)
