"""What follows a contraction inside its Region: residual add and activation, decoded once for all tactics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from venturi.backends.base import RegionView
from venturi.backends.cpu import onednn

T = torch.Tensor


@dataclass(frozen=True)
class Activation:
    """An activation with its numbers. `low`/`high` bound Clip; alpha/beta as in ONNX."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0
    low: float | None = None
    high: float | None = None
    mode: str = "none"

    def apply_(self, x: T) -> T:
        """In place where torch can; the result is returned."""
        return _IN_PLACE[self.name](x, self)

    def onednn(self) -> tuple[str, list[Any], str] | None:
        """(attr, scalars, algorithm) of a oneDNN post-op with the same meaning, NaN included; None when it has none."""
        found = _ONEDNN[self.name](self) if self.name in _ONEDNN else None
        return found if found is not None and onednn.keeps_nan(found[0], tuple(found[1]), found[2]) else None


_IN_PLACE: dict[str, Callable[[T, Activation], T]] = {
    "Relu": lambda x, a: x.relu_(),
    "Sigmoid": lambda x, a: x.sigmoid_(),
    "Tanh": lambda x, a: x.tanh_(),
    "LeakyRelu": lambda x, a: F.leaky_relu_(x, a.alpha),
    "Elu": lambda x, a: F.elu_(x, a.alpha),
    "HardSwish": lambda x, a: F.hardswish(x, inplace=True),
    "HardSigmoid": lambda x, a: x.mul_(a.alpha).add_(a.beta).clamp_(0, 1),
    "Mish": lambda x, a: F.mish(x, inplace=True),
    "Clip": lambda x, a: x.clamp_(a.low, a.high),
    "Gelu": lambda x, a: F.gelu(x, approximate=a.mode),
    "Swish": lambda x, a: F.silu(x, inplace=True) if a.alpha == 1.0 else x * torch.sigmoid(a.alpha * x),
}
_ONEDNN: dict[str, Callable[[Activation], tuple[str, list[Any], str] | None]] = {
    "Relu": lambda a: ("relu", [], ""),
    "Sigmoid": lambda a: ("sigmoid", [], ""),
    "Tanh": lambda a: ("tanh", [], ""),
    "HardSwish": lambda a: ("hardswish", [], ""),
    "HardSigmoid": lambda a: ("hardsigmoid", [], "") if abs(a.alpha - 1 / 6) < 1e-6 and a.beta == 0.5 else None,
    "LeakyRelu": lambda a: ("leaky_relu", [a.alpha], ""),
    "Clip": lambda a: ("hardtanh", [a.low, a.high], "") if a.low is not None and a.high is not None else None,
    "Gelu": lambda a: ("gelu", [], a.mode),
    "Swish": lambda a: ("swish", [], "") if a.alpha == 1.0 else None,
}
_DEFAULT_ALPHA = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2, "Swish": 1.0}


@dataclass(frozen=True)
class Epilogue:
    """bias (a 1-D weight added before all else), residual (index among dynamic inputs), activation, and their order."""

    bias: T | None = None
    residual: int | None = None
    activation: Activation | None = None
    activation_first: bool = False

    def apply_(self, y: T, args: tuple[Any, ...]) -> T:
        """Apply residual and activation to a fresh tensor `y`, in place where possible. Bias is the caller's."""
        if self.activation is not None and self.activation_first:
            y = self.activation.apply_(y)
        if self.residual is not None:
            y = y.add_(args[self.residual])
        if self.activation is not None and not self.activation_first:
            y = self.activation.apply_(y)
        return y


def read_epilogue(region: RegionView) -> Epilogue | str:
    """Decode the nodes after the anchor; a text says why that is impossible. Roundings within are the caller's."""
    bias: T | None = None
    residual: int | None = None
    activation: Activation | None = None
    activation_first = False
    value = region.anchor.outputs[0]
    for node in region.nodes[1:]:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            pass
        elif node.op_type == "Add":
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            weight = region.constant(other)
            if weight is not None:
                if bias is not None or residual is not None or activation is not None or weight.dim() != 1:
                    return "constant Add after residual or activation"
                bias = weight
            else:
                residual = region.position(other)
                activation_first = activation is not None
                if residual is None:
                    return "Add of a value from inside the Region"
        else:
            activation = read_activation(region, node)
            if activation is None:
                return f"{node.op_type} is not an activation with constant numbers"
        value = node.outputs[0]
    return Epilogue(bias, residual, activation, activation_first)


def read_activation(region: RegionView, node: ir.Node) -> Activation | None:
    if node.op_type not in _IN_PLACE:
        return None
    attrs = region.attrs(node)
    if node.op_type == "Clip":
        bounds = []
        for value in (*node.inputs[1:3], None, None)[:2]:
            weight = region.constant(value)
            if value is not None and weight is None:
                return None
            bounds.append(None if weight is None else float(weight.reshape(())))
        if bounds == [None, None]:
            return None
        return Activation("Clip", low=bounds[0], high=bounds[1])
    alpha = attrs.get("alpha", _DEFAULT_ALPHA.get(node.op_type, 0.0))
    return Activation(node.op_type, alpha, attrs.get("beta", 0.5), mode=attrs.get("approximate", "none"))
