"""The decoder-only transformer, built from a DecoderSpec. Every architecture is an instance of this module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.kernels.attention import AttentionBatch
from venturi.llm.layers.attention import Attention, LatentAttention, LayerCache
from venturi.llm.layers.feed_forward import make_feed_forward
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import make_norm, norm_for
from venturi.llm.layers.rotary import rotary_angles
from venturi.llm.models.spec import DecoderSpec, LayerSpec, RotarySpec


class DecoderLayer(nn.Module):
    def __init__(self, model: DecoderSpec, spec: LayerSpec) -> None:
        super().__init__()
        self.sandwich = spec.norms == "sandwich"
        latent = spec.attention.mla is not None
        self.self_attn = (LatentAttention if latent else Attention)(model, spec.attention)
        self.mlp = make_feed_forward(model.hidden, spec.mlp)
        self.input_layernorm = make_norm(model.norm, model.hidden, model.eps)
        self.post_attention_layernorm = make_norm(model.norm, model.hidden, model.eps)
        if self.sandwich:
            self.pre_feedforward_layernorm = make_norm(model.norm, model.hidden, model.eps)
            self.post_feedforward_layernorm = make_norm(model.norm, model.hidden, model.eps)

    def forward(
        self, x: Tensor, residual: Tensor | None, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch
    ) -> tuple[Tensor, Tensor]:
        h, residual = norm_for(self.self_attn, self.input_layernorm, x, residual)
        h = self.self_attn(h, angles, cache, batch)
        if not self.sandwich:
            h, residual = norm_for(self.mlp, self.post_attention_layernorm, h, residual)
            return self.mlp(h), residual
        h, _ = self.post_attention_layernorm(h)
        h, residual = norm_for(self.mlp, self.pre_feedforward_layernorm, h, residual)
        h, _ = self.post_feedforward_layernorm(self.mlp(h))
        return h, residual


class Decoder(nn.Module):
    """Tokens to hidden states to logits.

    `forward` writes the tokens' keys and values to the cache. It synchronizes nothing and, on CUDA, can be captured.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden)
        self.embed_tokens.weight.requires_grad_(False)
        if spec.learned_positions:
            self.embed_positions = nn.Embedding(spec.learned_positions, spec.hidden)
            self.embed_positions.weight.requires_grad_(False)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in spec.layers)
        self.norm = make_norm(spec.norm, spec.hidden, spec.eps)
        self.lm_head = Linear(spec.hidden, spec.vocab_size)
        self.angles: list[Tensor | None] = []

    def prepare(self, max_seq_len: int, device: torch.device) -> None:
        """Tie the head if the model does, compute rotary angles, let linear methods prepare their weights."""
        if self.spec.tied:
            self.lm_head.weight = nn.Parameter(self.embed_tokens.weight.data, requires_grad=False)
        known: dict[str, Tensor] = {}
        self.angles = []
        for layer in self.spec.layers:
            rotary = layer.attention.rotary
            if rotary is not None and repr(rotary) not in known:
                known[repr(rotary)] = _angles(rotary, max_seq_len, device)
            self.angles.append(None if rotary is None else known[repr(rotary)])
        for module in self.modules():
            if isinstance(module, Linear):
                module.method.prepare(module)

    def forward(self, tokens: Tensor, batch: AttentionBatch, caches: list[LayerCache]) -> Tensor:
        """tokens: [tokens] int64 -> hidden states after the last norm, [tokens, hidden]."""
        x = F.embedding(tokens, self.embed_tokens.weight)
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype)
        return self.from_embeddings(x, batch, caches)

    def from_embeddings(self, x: Tensor, batch: AttentionBatch, caches: list[LayerCache]) -> Tensor:
        """`forward` behind its first step: x [tokens, hidden] are the tokens' scaled embeddings."""
        if self.spec.learned_positions:
            x = x + F.embedding(batch.positions, self.embed_positions.weight)
        residual: Tensor | None = None
        for layer, angles, cache in zip(self.layers, self.angles, caches):
            x, residual = layer(x, residual, angles, cache, batch)
        return self.norm(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab] fp32."""
        return self.raw_logits(hidden).float()

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab] in the model's dtype."""
        return self.cap(self.lm_head(hidden))

    def cap(self, logits: Tensor) -> Tensor:
        """Soft-cap, for models that have one (in fp32)."""
        limit = self.spec.logit_softcap
        return logits if limit is None else limit * torch.tanh(logits.float() / limit)


def _angles(rotary: RotarySpec, max_seq_len: int, device: torch.device) -> Tensor:
    return rotary_angles(rotary, max_seq_len).to(device)
