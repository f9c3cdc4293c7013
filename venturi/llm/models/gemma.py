"""Gemma 2 and 3 (text): norms around each part, weights stored minus one, scaled embeddings, soft-capped logits."""

from __future__ import annotations

from venturi.llm.models.config import Config
from venturi.llm.models.llama import attention, decoder, mlp
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import DecoderSpec, LayerSpec


def layer_kinds(config: Config) -> list[str]:
    """Sliding or full attention: as listed, else every 6th (Gemma 3) or 2nd (Gemma 2) layer is full."""
    listed = config.get("layer_types", None)
    if listed:
        return list(listed)
    pattern = config.get("sliding_window_pattern", 6 if config.architecture.startswith("Gemma3") else 2)
    layers = range(1, config.integer("num_hidden_layers") + 1)
    return ["full_attention" if i % pattern == 0 else "sliding_attention" for i in layers]


def spec(config: Config) -> DecoderSpec:
    third = config.architecture.startswith("Gemma3")
    layers = []
    for kind in layer_kinds(config):
        sliding = kind == "sliding_attention"
        rotary = config.rotary(config.head_dim, kind)
        if third and sliding and "rope_parameters" not in config.fields:
            rotary = type(rotary)(rotary.dim, config.get("rope_local_base_freq", 1e4), rotary.max_positions, {})
        part = attention(
            config,
            config.get("sliding_window", None) if sliding else None,
            scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            softcap=config.get("attn_logit_softcapping", None),
            qk_norm=third,
            rotary=rotary,
        )
        layers.append(LayerSpec(part, mlp(config, "hidden_activation"), norms="sandwich"))
    return decoder(
        config,
        layers,
        norm="rms+1",
        tied=config.get("tie_word_embeddings", True),
        embedding_scale=config.integer("hidden_size") ** 0.5,
        logit_softcap=config.get("final_logit_softcapping", None),
    )


ARCHITECTURE = Architecture(spec)
