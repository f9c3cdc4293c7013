"""Attention layers over the paged cache: with separate keys and values, and with a shared latent (MLA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from venturi.kernels.attention import AttentionBatch, AttentionKind, paged_attention, rotated_attention
from venturi.kernels.quantize import ScaledRows
from venturi.kernels.rotary import CacheScales, rotate, rotate_and_write
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import RmsNorm
from venturi.llm.models.spec import AttentionSpec, DecoderSpec


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: k [blocks, block_tokens, kv_heads, k_dim], v likewise; MLA's v is a view into k. int8 codes
    have scales."""

    k: Tensor
    v: Tensor
    scales: CacheScales | None = None


class Attention(nn.Module):
    """Projections, optional normalization of heads, rotation, cache, attention, output projection."""

    def __init__(self, model: DecoderSpec, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kind = AttentionKind(spec.scale, spec.window, spec.softcap)
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv_proj = Linear(model.hidden, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=spec.bias)
        self.o_proj = Linear(q, model.hidden, bias=spec.out_bias)
        offset = 1.0 if model.norm == "rms+1" else 0.0
        self.q_norm = RmsNorm(spec.head_dim, model.eps, offset) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, model.eps, offset) if spec.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(spec.num_heads), requires_grad=False) if spec.sinks else None

    @property
    def reader(self) -> Linear:
        """The only layer that reads the input."""
        return self.qkv_proj

    def forward(
        self, x: Tensor | ScaledRows, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch
    ) -> Tensor:
        return self.o_proj(self.attend(self.qkv_proj(x), angles, cache, batch).flatten(1))

    def attend(self, x: Tensor, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        """From the projections [tokens, q + k + v] to the heads' outputs [tokens, heads, v_dim]."""
        spec = self.spec
        q, k, v = self.qkv_proj.split(x)
        q = q.view(len(x), spec.num_heads, spec.head_dim)
        k, v = k.view(len(x), spec.num_kv_heads, spec.head_dim), v.view(len(x), spec.num_kv_heads, spec.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        interleaved = spec.rotary is not None and spec.rotary.interleaved
        return rotated_attention(
            q, k, v, angles, interleaved, cache.k, cache.v, batch, self.kind, self.sinks, cache.scales
        )


class LatentAttention(nn.Module):
    """Multi-head latent attention in its absorbed form: every head attends to one shared head of latent + rope,

    because q_nope . (W_k c) = (W_k^T q_nope) . c, and the values W_v c are expanded after the softmax.
    """

    def __init__(self, model: DecoderSpec, spec: AttentionSpec) -> None:
        super().__init__()
        assert spec.mla is not None, "LatentAttention needs an MlaSpec"
        self.spec, self.mla = spec, spec.mla
        self.kind = AttentionKind(spec.scale, spec.window, spec.softcap)
        mla, heads = spec.mla, spec.num_heads
        q_dim = heads * (mla.nope_dim + mla.rope_dim)
        self.q_proj = Linear(model.hidden, q_dim) if mla.q_rank is None else None
        if mla.q_rank is not None:
            self.q_a_proj = Linear(model.hidden, mla.q_rank, bias=spec.bias)
            self.q_a_layernorm = RmsNorm(mla.q_rank, 1e-6)
            self.q_b_proj = Linear(mla.q_rank, q_dim)
        self.kv_a_proj_with_mqa = Linear(model.hidden, mla.kv_rank + mla.rope_dim, bias=spec.bias)
        self.kv_a_layernorm = RmsNorm(mla.kv_rank, 1e-6)
        self.kv_b_proj = Linear(mla.kv_rank, heads * (mla.nope_dim + mla.v_dim))
        self.o_proj = Linear(heads * mla.v_dim, model.hidden, bias=spec.out_bias)

    def forward(self, x: Tensor, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        mla, heads, tokens = self.mla, self.spec.num_heads, len(x)
        if self.q_proj is not None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))[0])
        q_nope, q_rope = q.view(tokens, heads, -1).split([mla.nope_dim, mla.rope_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([mla.kv_rank, mla.rope_dim], -1)
        expand = self.kv_b_proj.weight.view(heads, mla.nope_dim + mla.v_dim, mla.kv_rank)
        absorbed = torch.einsum("thn,hnr->thr", q_nope, expand[:, : mla.nope_dim])
        assert angles is not None, "MLA always rotates"
        assert self.spec.rotary is not None, "MLA always rotates"
        cos, sin = angles[batch.positions].chunk(2, dim=-1)
        interleaved = self.spec.rotary.interleaved
        q_rope = rotate(q_rope, cos, sin, interleaved)
        k_rope = rotate(k_rope[:, None], cos, sin, interleaved)
        key = torch.cat((self.kv_a_layernorm(latent.contiguous())[0][:, None], k_rope), -1)
        query = torch.cat((absorbed, q_rope), -1)
        query = rotate_and_write(query, key, key, None, batch.positions, cache.k, cache.v, batch.slots, False)
        out = paged_attention(query, cache.k, cache.v, batch, self.kind)
        values = torch.einsum("thr,hvr->thv", out, expand[:, mla.nope_dim :])
        return self.o_proj(values.reshape(tokens, -1))
