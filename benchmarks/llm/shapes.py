"""Model shapes that the benchmarks run with random weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "dtype": "bfloat16", "eos_token_id": 128001,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "dtype": "bfloat16", "tie_word_embeddings": True,
    "model_type": "qwen2",
}  # fmt: skip
SHAPES = {"llama-8b": LLAMA_8B, "qwen-0.5b": QWEN_05B}


def folder_of(name: str, **changes: object) -> Path:
    """A folder with the shape's config.json (no weights: load_format="dummy")."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | changes))
    return folder


def linear_parameters(name: str) -> int:
    """Weights that a decode step reads: all linear layers and the head."""
    c = SHAPES[name]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    head_dim = hidden // c["num_attention_heads"]
    attention = hidden * head_dim * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    return c["num_hidden_layers"] * (attention + 3 * hidden * inner) + hidden * c["vocab_size"]
