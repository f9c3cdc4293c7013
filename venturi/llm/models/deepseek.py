"""DeepSeek-V2 and V3: latent attention, dense first layers, then grouped routing with shared experts."""

from __future__ import annotations

from venturi.llm.layers.rotary import yarn_score_scale
from venturi.llm.models.config import Config
from venturi.llm.models.llama import decoder, mlp
from venturi.llm.models.registry import Architecture
from venturi.llm.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlaSpec, MlpSpec, MoeSpec


def latent_attention(config: Config) -> AttentionSpec:
    mla = MlaSpec(
        q_rank=config.get("q_lora_rank", None),
        kv_rank=config.integer("kv_lora_rank"),
        nope_dim=config.integer("qk_nope_head_dim"),
        rope_dim=config.integer("qk_rope_head_dim"),
        v_dim=config.integer("v_head_dim"),
    )
    heads, head_dim = config.integer("num_attention_heads"), mla.nope_dim + mla.rope_dim
    rotary = config.rotary(mla.rope_dim, interleaved=config.get("rope_interleave", True))
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 * yarn_score_scale(rotary.scaling),
        rotary=rotary,
        bias=config.get("attention_bias", False),
        out_bias=config.get("attention_bias", False),
        mla=mla,
    )


def experts(config: Config) -> MoeSpec:
    third = config.architecture.startswith("DeepseekV3")
    grouped = third or config.get("topk_method", "greedy") == "group_limited_greedy"
    inner, act = config.integer("moe_intermediate_size"), config.get("hidden_act", "silu")
    shared = config.get("n_shared_experts", 0)
    return MoeSpec(
        num_experts=config.integer("n_routed_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate=inner,
        activation=act,
        routing="grouped-sigmoid" if third else "grouped-softmax",
        renormalize=third and config.get("norm_topk_prob", True),
        scaling=config.get("routed_scaling_factor", 1.0),
        groups=config.get("n_group", 1) if grouped else 1,
        top_groups=config.get("topk_group", 1) if grouped else 1,
        shared=MlpSpec(inner * shared, act) if shared else None,
    )


def spec(config: Config) -> DecoderSpec:
    attention, moe, dense = latent_attention(config), experts(config), config.get("first_k_dense_replace", 0)
    count = config.integer("num_hidden_layers")
    return decoder(config, [LayerSpec(attention, mlp(config) if i < dense else moe) for i in range(count)])


ARCHITECTURE = Architecture(spec, renames=((r"\.gate\.e_score_correction_bias$", ".correction"),))
