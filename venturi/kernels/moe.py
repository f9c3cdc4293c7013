"""Mixture of experts: which experts a token goes to, and the feed-forward of all tokens through their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from venturi.kernels.activations import clamped_swiglu, gated

_ON_DEVICE = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class Routing:
    """How scores become choices.

    kind: softmax over all experts, then the top_k largest; topk-softmax the other way round; grouped-softmax and
    grouped-sigmoid (DeepSeek-V2 and V3) choose within the best `top_groups` of `groups` of experts. A group's score is
    its best expert's, with sigmoid the sum of its two best. renormalize: chosen weights sum to 1. scale: their factor.
    """

    kind: Literal["softmax", "topk-softmax", "grouped-softmax", "grouped-sigmoid"]
    top_k: int
    renormalize: bool = False
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Gate:
    """act(gate) * up of the rows [gate | up]; clamped (alpha, limit): `clamped_swiglu` of alternating rows instead."""

    activation: str
    clamped: tuple[float, float] | None = None

    def __call__(self, gate_up: Tensor) -> Tensor:
        return gated(gate_up, self.activation) if self.clamped is None else clamped_swiglu(gate_up, *self.clamped)

    @property
    def on_device(self) -> str | None:
        """Its name in the CUDA kernels; None: they do not know it."""
        return "clamped" if self.clamped is not None else _ON_DEVICE.get(self.activation)


def route(logits: Tensor, correction: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """(weights fp32, experts), [tokens, top_k].

    logits: [tokens, experts]. correction: [experts], added to the scores for the choice only (grouped-sigmoid).
    """
    if logits.is_cuda:
        from venturi.kernels.triton_kernels.routing import route as on_device

        return on_device(logits, correction, routing)
    logits = logits.float()
    if routing.kind == "topk-softmax":
        chosen, experts = logits.topk(routing.top_k, dim=-1)
        return chosen.softmax(-1) * routing.scale, experts
    scores = logits.sigmoid() if routing.kind == "grouped-sigmoid" else logits.softmax(-1)
    choice = scores if correction is None else scores + correction.float()
    if routing.groups > 1:
        choice = _within_best_groups(choice, routing)
    experts = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if routing.kind == "grouped-sigmoid" else 0.0))
    return weights * routing.scale, experts


def _within_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    grouped = choice.view(len(choice), routing.groups, -1)
    two_best = routing.kind == "grouped-sigmoid"
    value = grouped.topk(2, dim=-1).values.sum(-1) if two_best else grouped.amax(-1)
    best = value.topk(routing.top_groups, dim=-1).indices
    keep = torch.zeros_like(value, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep[..., None], 0.0).flatten(1)


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up: [experts, 2n, hidden], down: [experts, hidden, n], their biases [experts, ...] or None."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def experts_forward(x: Tensor, weights: Tensor, experts: Tensor, of: ExpertWeights, gate: Gate) -> Tensor:
    """sum_k weights[:, k] * expert(x, experts[:, k]), [tokens, hidden].

    On CUDA in four launches, which a graph can hold, when the kernels know the gate; else expert by expert over its own
    tokens. x: [tokens, hidden]. weights, experts: [tokens, k], of `route`.
    """
    if x.is_cuda and gate.on_device:
        from venturi.kernels.triton_kernels.grouped_linear import experts_forward as on_device

        return on_device(x, weights, experts, of, gate)

    out = torch.zeros_like(x, dtype=torch.float32)
    for index in range(len(of.down)):
        rows, place = (experts == index).nonzero(as_tuple=True)
        if len(rows):
            out.index_add_(0, rows, _one_expert(x[rows], index, of, gate).float() * weights[rows, place, None])
    return out.to(x.dtype)


def _one_expert(x: Tensor, index: int, of: ExpertWeights, gate: Gate) -> Tensor:
    inner = gate(F.linear(x, of.gate_up[index], None if of.gate_up_bias is None else of.gate_up_bias[index]))
    return F.linear(inner, of.down[index], None if of.down_bias is None else of.down_bias[index])
