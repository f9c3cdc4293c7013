"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from venturi.llm.models.config import Config
from venturi.llm.models.llama import like_llama
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import DecoderSpec, MoeSpec


def spec(config: Config) -> DecoderSpec:
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=config.integer("intermediate_size"),
        activation=config.get("hidden_act", "silu"),
        routing="softmax",
        renormalize=True,
    )
    return like_llama(config, moe)


ARCHITECTURE = Architecture(
    spec,
    renames=(
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.w2\.", ".down_proj."),
    ),
)
