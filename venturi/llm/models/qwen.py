"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (normalized heads). Sliding windows where the config says so."""

from __future__ import annotations

from typing import Any

from venturi.llm.models.config import Config
from venturi.llm.models.llama import attention, decoder, mlp
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import DecoderSpec, LayerSpec


def attention_changes(config: Config) -> dict[str, Any]:
    if config.architecture.startswith("Qwen2"):
        return {"bias": True, "out_bias": False}
    return {"qk_norm": True}


def windows(config: Config) -> list[int | None]:
    layers, window = config.integer("num_hidden_layers"), config.get("sliding_window", None)
    if not config.get("use_sliding_window", False):
        return [None] * layers
    if config.get("layer_types", None):
        return config.windows()
    full = config.get("max_window_layers", layers)
    return [window if i >= full else None for i in range(layers)]


def spec(config: Config) -> DecoderSpec:
    changes = attention_changes(config)
    return decoder(config, [LayerSpec(attention(config, w, **changes), mlp(config)) for w in windows(config)])


ARCHITECTURE = Architecture(spec)
