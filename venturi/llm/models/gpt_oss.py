"""GPT-OSS: attention sinks, alternating windows, biased experts with a clamped SwiGLU. Experts in bf16 (not MXFP4)."""

from __future__ import annotations

from torch import Tensor

from venturi.core.errors import ModelError
from venturi.llm.models.config import Config
from venturi.llm.models.llama import like_llama
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import DecoderSpec, MoeSpec


def spec(config: Config) -> DecoderSpec:
    quantization = config.get("quantization_config", {})
    if quantization:
        raise ModelError(
            f"experts stored as {quantization.get('quant_method')} are not supported; save the model in bf16 first",
            where=config.where,
        )
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
        activation="silu",
        routing="topk-softmax",
        router_bias=True,
        clamped_swiglu=(config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)),
    )
    bias = config.get("attention_bias", True)
    return like_llama(config, moe, sinks=True, bias=bias, out_bias=bias)


def transpose(name: str, value: Tensor) -> Tensor:
    return value.transpose(1, 2) if name.endswith(("experts.gate_up", "experts.down")) else value


ARCHITECTURE = Architecture(
    spec,
    renames=(
        (r"\.mlp\.router\.", ".mlp.gate."),
        (r"\.experts\.gate_up_proj_bias$", ".experts.gate_up_bias"),
        (r"\.experts\.down_proj_bias$", ".experts.down_bias"),
        (r"\.experts\.gate_up_proj$", ".experts.gate_up"),
        (r"\.experts\.down_proj$", ".experts.down"),
    ),
    transform=transpose,
)
