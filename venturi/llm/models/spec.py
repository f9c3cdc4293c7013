"""What a decoder-only model is made of, as data. An architecture file turns a config.json into a DecoderSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

NormKind = Literal["rms", "rms+1", "layer"]


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding of the first `dim` features. `scaling` is the config's rope record."""

    dim: int
    theta: float
    max_positions: int
    scaling: dict[str, Any]
    interleaved: bool = False


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2): keys and values are a shared latent of `kv_rank` plus `rope_dim`."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: RotarySpec | None
    bias: bool = False
    out_bias: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: bool = False
    mla: MlaSpec | None = None

    @property
    def cache_heads(self) -> int:
        return 1 if self.mla else self.num_kv_heads

    @property
    def cache_k_dim(self) -> int:
        return self.mla.kv_rank + self.mla.rope_dim if self.mla else self.head_dim

    @property
    def cache_v_dim(self) -> int:
        """Values stored beside the keys; 0 when they are part of the keys."""
        return 0 if self.mla else self.head_dim


@dataclass(frozen=True)
class MlpSpec:
    intermediate: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """routing: softmax, topk-softmax, grouped-softmax (DeepSeek-V2) or grouped-sigmoid (DeepSeek-V3)."""

    num_experts: int
    top_k: int
    intermediate: int
    activation: str
    routing: Literal["softmax", "topk-softmax", "grouped-softmax", "grouped-sigmoid"]
    renormalize: bool = False
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared: MlpSpec | None = None
    router_bias: bool = False
    clamped_swiglu: tuple[float, float] | None = None  # (alpha, limit): GPT-OSS experts, with biases


@dataclass(frozen=True)
class LayerSpec:
    """norms: "pre" before attention and feed-forward; "sandwich" also after each (Gemma)."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec
    norms: Literal["pre", "sandwich"] = "pre"


@dataclass(frozen=True)
class DecoderSpec:
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm: NormKind
    eps: float
    max_positions: int
    tied: bool = False
    embedding_scale: float = 1.0
    learned_positions: int = 0
    logit_softcap: float | None = None
