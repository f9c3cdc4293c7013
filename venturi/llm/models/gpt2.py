"""GPT-2: learned positions, LayerNorm, one fused projection, weights stored transposed."""

from __future__ import annotations

from torch import Tensor

from venturi.llm.models.config import Config
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec


def spec(config: Config) -> DecoderSpec:
    hidden, heads, layers = config.integer("n_embd"), config.integer("n_head"), config.integer("n_layer")
    dim, inner = hidden // heads, config.get("n_inner", 4 * hidden)
    feed_forward = MlpSpec(inner, config.get("activation_function", "gelu_new"), gated=False, bias=True)

    def layer(index: int) -> LayerSpec:
        scale = dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= index + 1
        return LayerSpec(AttentionSpec(heads, heads, dim, scale, None, bias=True, out_bias=True), feed_forward)

    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        layers=tuple(layer(i) for i in range(layers)),
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        max_positions=config.max_positions,
        tied=config.get("tie_word_embeddings", True),
        learned_positions=config.max_positions,
    )


def transpose(name: str, value: Tensor) -> Tensor:
    projection = any(part in name for part in ("qkv_proj", "o_proj", "up_proj", "down_proj"))
    return value.t() if projection and value.ndim == 2 else value


ARCHITECTURE = Architecture(
    spec,
    renames=(
        (r"^transformer\.", ""),
        (r"^wte\.", "embed_tokens."),
        (r"^wpe\.", "embed_positions."),
        (r"^h\.", "layers."),
        (r"^ln_f\.", "norm."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
    ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    transform=transpose,
)
