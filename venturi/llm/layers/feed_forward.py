"""Feed-forward layers: plain, gated, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.kernels.activations import ACTIVATIONS, clamped_swiglu, gated, gated_fp8
from venturi.kernels.moe import experts_forward, grouped_top_k, softmax_top_k, top_k_softmax
from venturi.kernels.quantize import ScaledRows
from venturi.llm.layers.linear import Linear
from venturi.llm.models.spec import MlpSpec, MoeSpec


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, hidden: int, spec: MlpSpec) -> None:
        super().__init__()
        n = spec.intermediate
        self.activation = spec.activation
        self.act: Callable[[Tensor], Tensor] = partial(gated, activation=spec.activation)
        self.gate_up_proj = Linear(hidden, {"gate_proj": n, "up_proj": n}, bias=spec.bias)
        self.down_proj = Linear(n, hidden, bias=spec.bias)

    @property
    def reader(self) -> Linear:
        """The only layer that reads the input."""
        return self.gate_up_proj

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        inner = self.gate_up_proj(x)
        fp8 = inner.is_cuda and self.down_proj.method.takes_fp8
        return self.down_proj(gated_fp8(inner, self.activation) if fp8 else self.act(inner))


class PlainMlp(nn.Module):
    """down(act(up(x)))"""

    def __init__(self, hidden: int, spec: MlpSpec) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = ACTIVATIONS[spec.activation]
        self.up_proj = Linear(hidden, spec.intermediate, bias=spec.bias)
        self.down_proj = Linear(spec.intermediate, hidden, bias=spec.bias)

    @property
    def reader(self) -> Linear:
        """The only layer that reads the input."""
        return self.up_proj

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class Experts(nn.Module):
    """All experts' weights in two tensors: gate_up [experts, 2n, hidden], down [experts, hidden, n]."""

    def __init__(self, hidden: int, spec: MoeSpec) -> None:
        super().__init__()
        self.spec = spec
        count, n = spec.num_experts, spec.intermediate
        self.gate_up = nn.Parameter(torch.empty(count, 2 * n, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(count, hidden, n), requires_grad=False)
        biased = spec.clamped_swiglu is not None
        self.gate_up_bias = nn.Parameter(torch.empty(count, 2 * n), requires_grad=False) if biased else None
        self.down_bias = nn.Parameter(torch.empty(count, hidden), requires_grad=False) if biased else None

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return experts_forward(x, weights, experts, self.spec.num_experts, self._one)

    def _one(self, x: Tensor, index: int) -> Tensor:
        gate_up = F.linear(x, self.gate_up[index], None if self.gate_up_bias is None else self.gate_up_bias[index])
        if self.spec.clamped_swiglu is not None:
            inner = clamped_swiglu(gate_up, *self.spec.clamped_swiglu)
        else:
            inner = gated(gate_up, self.spec.activation)
        return F.linear(inner, self.down[index], None if self.down_bias is None else self.down_bias[index])


class MixtureOfExperts(nn.Module):
    """Router, experts, and an optional shared expert that every token takes."""

    def __init__(self, hidden: int, spec: MoeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Linear(hidden, spec.num_experts, bias=spec.router_bias)
        self.experts = Experts(hidden, spec)
        self.shared_experts = GatedMlp(hidden, spec.shared) if spec.shared else None
        sigmoid = spec.routing == "grouped-sigmoid"
        self.correction = nn.Parameter(torch.empty(spec.num_experts), requires_grad=False) if sigmoid else None

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self._route(x)
        out = self.experts(x, weights * self.spec.scaling, experts)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        if not spec.routing.startswith("grouped"):
            logits = self.gate(x)
            if spec.routing == "topk-softmax":
                return top_k_softmax(logits, spec.top_k)
            return softmax_top_k(logits, spec.top_k, spec.renormalize)
        logits = F.linear(x.float(), self.gate.weight.float())
        if self.correction is None:
            scores = choice = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            choice = scores + self.correction.float()
        weights, experts = grouped_top_k(
            scores, choice, spec.top_k, spec.groups, spec.top_groups, two_best=self.correction is not None
        )
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights, experts


def make_feed_forward(hidden: int, spec: MlpSpec | MoeSpec) -> nn.Module:
    if isinstance(spec, MoeSpec):
        return MixtureOfExperts(hidden, spec)
    return GatedMlp(hidden, spec) if spec.gated else PlainMlp(hidden, spec)
