"""Mixture of experts: which experts a token goes to, and the feed-forward of all tokens through their experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax_top_k(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in fp32, then the k largest. Returns (weights, experts), [tokens, k]."""
    weights, experts = logits.float().softmax(-1).topk(k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), experts


def top_k_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, then softmax over them."""
    chosen, experts = logits.float().topk(k, dim=-1)
    return chosen.softmax(-1), experts


def grouped_top_k(
    scores: Tensor, choice: Tensor, k: int, groups: int, top_groups: int, *, two_best: bool
) -> tuple[Tensor, Tensor]:
    """The k experts of largest `choice` within the best `top_groups` groups; weights are their `scores`.

    A group's score is the sum of its two best experts (two_best) or its best. scores, choice: [tokens, experts], fp32.
    """
    if groups > 1:
        grouped = choice.view(len(choice), groups, -1)
        value = grouped.topk(2, dim=-1).values.sum(-1) if two_best else grouped.amax(-1)
        best = value.topk(top_groups, dim=-1).indices
        keep = torch.zeros_like(value, dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~keep[..., None], 0.0).flatten(1)
    experts = choice.topk(k, dim=-1).indices
    return scores.gather(1, experts), experts


def experts_forward(
    x: Tensor, weights: Tensor, experts: Tensor, num_experts: int, expert: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """sum_k weights[:, k] * expert(x, experts[:, k]), expert by expert over its own tokens.

    Args:
        x: [tokens, hidden]. weights: [tokens, k] fp32. experts: [tokens, k] int64. expert(rows, index) -> rows.
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    for index in range(num_experts):
        rows, place = (experts == index).nonzero(as_tuple=True)
        if len(rows):
            out.index_add_(0, rows, expert(x[rows], index).float() * weights[rows, place, None])
    return out.to(x.dtype)
