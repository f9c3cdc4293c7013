"""Qwen3-MoE: Qwen3 with mixtures of experts in all layers but those in mlp_only_layers."""

from __future__ import annotations

from venturi.llm.models.config import Config
from venturi.llm.models.llama import attention, decoder, mlp
from venturi.llm.models.qwen import attention_changes, windows
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import DecoderSpec, LayerSpec, MoeSpec


def spec(config: Config) -> DecoderSpec:
    moe = MoeSpec(
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("moe_intermediate_size"),
        activation=config.get("hidden_act", "silu"),
        routing="softmax",
        renormalize=config.get("norm_topk_prob", False),
    )
    dense, step = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
    changes = attention_changes(config)
    layers = [
        LayerSpec(attention(config, window, **changes), mlp(config) if i in dense or (i + 1) % step else moe)
        for i, window in enumerate(windows(config))
    ]
    return decoder(config, layers)


ARCHITECTURE = Architecture(spec)
