"""Tiny random models of every architecture, made from transformers' config classes and saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = COMMON | {"num_key_value_heads": 2, "intermediate_size": 80}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6, "original_max_position_embeddings": 256}  # fmt: skip
MLA = GQA | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.3, "norm_topk_prob": True,
}  # fmt: skip

# name -> (config class, arguments)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", GQA),
    "llama3": ("LlamaConfig", GQA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": ("LlamaConfig", GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "LlamaConfig",
        GQA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-yarn": ("LlamaConfig", GQA | {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", GQA | {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen2-window": ("Qwen2Config", GQA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", GQA | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GQA | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", GQA | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", GQA),
    "phi3-long": ("Phi3Config", GQA | {"rope_parameters": LONG}),
    "phi4-mini": (
        "Phi3Config",
        GQA
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 199,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": ("MixtralConfig", GQA | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        GQA
        | {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        GQA | {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek-v2": ("DeepseekV2Config", MLA | {"topk_method": "group_limited_greedy", "norm_topk_prob": False}),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        MLA | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v3": ("DeepseekV3Config", MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
}


def make(name: str, folder: Path) -> Any:
    """Save the tiny model under `folder` and return transformers' model (fp32, eval)."""
    import torch
    import transformers

    kind, arguments = TINY[name]
    config = getattr(transformers, kind)(**arguments)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1 or "norm" in key:
                value.add_(torch.randn_like(value) * 0.1)
            else:
                value.copy_(torch.randn_like(value) * (1.5 / value.shape[-1] ** 0.5))
    for key, value in model.named_buffers():
        if "e_score_correction_bias" in key:
            value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return model
