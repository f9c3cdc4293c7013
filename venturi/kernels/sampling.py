"""Drawing one token per row: temperature, top-k, top-p, min-p, then the Gumbel-max trick with counter-based noise.

token = argmax over the kept tokens of logit / temperature + g, where g = -log(-log(u)) and u is a hash of
(seed, step, token): the same request draws the same tokens in any batch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (two multiply-xorshift rounds), on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gumbel(seeds: Tensor, steps: Tensor, vocab: int) -> Tensor:
    """[rows] seeds and steps -> [rows, vocab] Gumbel noise, fp32."""
    key = mix(mix(seeds & _MASK) ^ ((seeds >> 32) & _MASK) ^ ((steps * 0x9E3779B1) & _MASK))
    token = torch.arange(vocab, device=seeds.device)
    bits = mix((key[:, None] + token * 0x85EBCA6B) & _MASK)
    uniform = ((bits >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def keep_threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit that survives, [rows, 1]; ties survive together.

    top_k keeps the k largest (0: all); top_p the fewest of those whose probabilities reach p; min_p those at least
    min_p times as likely as the likeliest.
    """
    ordered = scaled.sort(dim=-1, descending=True).values
    vocab = scaled.shape[-1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)[:, None]
    place = torch.arange(vocab, device=scaled.device)
    probs = ordered.masked_fill(place >= k, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    count = ((before < top_p[:, None]) & (place < k)).sum(-1, keepdim=True).clamp(min=1)
    threshold = ordered.gather(1, count - 1)
    return torch.maximum(threshold, ordered[:, :1] + torch.log(min_p)[:, None])


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor,
    *, truncated: bool = True,
) -> Tensor:  # fmt: skip
    """[rows, vocab] fp32 logits -> [rows] int64 tokens. Rows with temperature 0 take the largest logit.

    Args:
        temperature, top_p, min_p: [rows] fp32. top_k, seeds, steps: [rows] int64.
        truncated: False when no row uses top_k, top_p or min_p.
    """
    if logits.is_cuda:
        from venturi.kernels.triton_kernels.sampling import sample as on_device

        return on_device(logits, temperature, top_k, top_p, min_p, seeds, steps)
    greedy = logits.argmax(-1)
    scaled = logits / temperature.clamp(min=1e-6)[:, None]
    if truncated:
        scaled = scaled.masked_fill(scaled < keep_threshold(scaled, top_k, top_p, min_p), float("-inf"))
    drawn = (scaled + gumbel(seeds, steps, logits.shape[-1])).argmax(-1)
    return torch.where(temperature == 0, greedy, drawn)
