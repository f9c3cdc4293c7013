"""Feed-forward layers: plain, gated, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.kernels.activations import ACTIVATIONS, gated, gated_fp8
from venturi.kernels.moe import ExpertWeights, Gate, Routing, experts_forward, route
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
        self.spec, self.gate = spec, Gate(spec.activation, spec.clamped_swiglu)
        count, n = spec.num_experts, spec.intermediate
        self.gate_up = nn.Parameter(torch.empty(count, 2 * n, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(count, hidden, n), requires_grad=False)
        biased = spec.clamped_swiglu is not None
        self.gate_up_bias = nn.Parameter(torch.empty(count, 2 * n), requires_grad=False) if biased else None
        self.down_bias = nn.Parameter(torch.empty(count, hidden), requires_grad=False) if biased else None

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        own = ExpertWeights(self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return experts_forward(x, weights, experts, own, self.gate)


class MixtureOfExperts(nn.Module):
    """Router, experts, and an optional shared expert that every token takes."""

    def __init__(self, hidden: int, spec: MoeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Linear(hidden, spec.num_experts, bias=spec.router_bias)
        self.experts = Experts(hidden, spec)
        self.shared_experts = GatedMlp(hidden, spec.shared) if spec.shared else None
        sigmoid = spec.routing == "grouped-sigmoid"
        self.routing = Routing(spec.routing, spec.top_k, spec.renormalize, spec.groups, spec.top_groups, spec.scaling)
        self.correction = nn.Parameter(torch.empty(spec.num_experts), requires_grad=False) if sigmoid else None

    def forward(self, x: Tensor) -> Tensor:
        in_fp32 = self.routing.kind.startswith("grouped")
        logits = F.linear(x.float(), self.gate.weight.float()) if in_fp32 else self.gate(x)
        out = self.experts(x, *route(logits, self.correction, self.routing))
        return out if self.shared_experts is None else out + self.shared_experts(x)


def make_feed_forward(hidden: int, spec: MlpSpec | MoeSpec) -> nn.Module:
    if isinstance(spec, MoeSpec):
        return MixtureOfExperts(hidden, spec)
    return GatedMlp(hidden, spec) if spec.gated else PlainMlp(hidden, spec)
