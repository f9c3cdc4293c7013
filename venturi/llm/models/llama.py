"""Llama 2 and 3, Mistral, and everything that shares their shape."""

from __future__ import annotations

from typing import Any

from venturi.llm.models.config import Config
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, MoeSpec


def attention(config: Config, window: int | None = None, **changes: Any) -> AttentionSpec:
    """The grouped-query attention of a Llama-like config."""
    head_dim, heads = config.head_dim, config.integer("num_attention_heads")
    fields: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rotary": config.rotary(head_dim),
        "bias": config.get("attention_bias", False),
        "out_bias": config.get("attention_bias", False),
        "window": window,
    }
    return AttentionSpec(**(fields | changes))


def mlp(config: Config, activation: str = "hidden_act") -> MlpSpec:
    bias = config.get("mlp_bias", False)
    return MlpSpec(config.integer("intermediate_size"), config.get(activation, "silu"), bias=bias)


def decoder(config: Config, layers: list[LayerSpec], **changes: Any) -> DecoderSpec:
    """A decoder around the layers, with the fields that all Llama-like configs name alike."""
    fields: dict[str, Any] = {
        "vocab_size": config.integer("vocab_size"),
        "hidden": config.integer("hidden_size"),
        "layers": tuple(layers),
        "norm": "rms",
        "eps": config.get("rms_norm_eps", 1e-6),
        "max_positions": config.max_positions,
        "tied": config.get("tie_word_embeddings", False),
    }
    return DecoderSpec(**(fields | changes))


def like_llama(config: Config, feed_forward: MlpSpec | MoeSpec | None = None, **changes: Any) -> DecoderSpec:
    """Every layer alike but for the window; `changes` are fields of AttentionSpec."""
    part = feed_forward or mlp(config)
    return decoder(config, [LayerSpec(attention(config, window, **changes), part) for window in config.windows()])


ARCHITECTURE = Architecture(like_llama, ignored=(r"rotary_emb\.inv_freq$",))
