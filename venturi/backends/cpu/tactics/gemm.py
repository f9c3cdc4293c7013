"""Products with constant weights and their epilogue: oneDNN's fused linear, ATen's linear; and plain matmul."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cpu import onednn
from venturi.backends.cpu.epilogue import Epilogue, read_epilogue

T = torch.Tensor


@dataclass(frozen=True)
class LinearSpec:
    """y = x @ weight^T + bias with `weight` [N, K], then the epilogue."""

    weight: T
    bias: T | None
    epilogue: Epilogue


def read_linear(region: RegionView) -> LinearSpec | str:
    """MatMul by a 2-D weight, or Gemm with alpha = 1, as a linear layer."""
    node = region.anchor
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return "the anchor is not a product"
    weight = region.constant(node.inputs[1])
    if weight is None or weight.dim() != 2 or not weight.dtype.is_floating_point:
        return "the second operand is not a constant floating-point matrix"
    if region.position(node.inputs[0]) != 0:
        return "the first operand is not the first dynamic value"
    epilogue = read_epilogue(region)
    if isinstance(epilogue, str):
        return epilogue
    bias = epilogue.bias
    if node.op_type == "MatMul":
        return LinearSpec(weight.T, bias, epilogue)
    attrs = region.attrs(node)
    if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return "Gemm with transA, alpha or beta"
    own_value = node.inputs[2] if len(node.inputs) > 2 else None
    own = region.constant(own_value)
    width = weight.shape[0 if attrs.get("transB", 0) else 1]
    if own_value is not None and (own is None or own.dim() != 1 or own.shape[0] != width):
        return "Gemm's third operand is not a constant row"
    if own is not None and bias is not None:
        own = own + bias
    return LinearSpec(weight if attrs.get("transB", 0) else weight.T, own if own is not None else bias, epilogue)


class OneDnnLinear:
    """One call: product, bias, residual add or activation, on blocked weights."""

    name = "onednn-linear"

    def match(self, region: RegionView) -> list[Config] | str:
        spec = read_linear(region)
        if isinstance(spec, str):
            return spec
        if not onednn.has_fused_linear() or not onednn.computes(spec.weight.dtype) or spec.weight.numel() == 0:
            return f"oneDNN has no fused linear in {spec.weight.dtype} here"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        spec = read_linear(region)
        assert isinstance(spec, LinearSpec)
        packed = torch.ops.mkldnn._reorder_linear_weight(spec.weight.contiguous(), 64)
        bias, act, residual = spec.bias, spec.epilogue.activation, spec.epilogue.residual
        if residual is not None and not spec.epilogue.activation_first:
            fused = torch.ops.mkldnn._linear_pointwise.binary

            def run_add(*args: Any) -> T:
                y: T = fused(args[0].contiguous(), args[residual].contiguous(), packed, bias, "add")
                return y if act is None else act.apply_(y)

            return Kernel(_guard(run_add, spec))
        plain = torch.ops.mkldnn._linear_pointwise
        post = ("none", [], "") if act is None else act.onednn()

        def run(*args: Any) -> T:
            x = args[0].contiguous()
            if post is not None:
                y: T = plain(x, packed, bias, *post)
            else:
                assert act is not None
                y = act.apply_(plain(x, packed, bias, "none", [], ""))
            return y if residual is None else y.add_(args[residual])

        return Kernel(_guard(run, spec))


def _guard(run: Any, spec: LinearSpec) -> Any:
    """oneDNN refuses empty and 1-D inputs; ATen takes them."""
    other = aten_linear(spec)
    return lambda *args: run(*args) if args[0].numel() and args[0].dim() > 1 else other(*args)


def aten_linear(spec: LinearSpec) -> Any:
    """On the weights as they lie, nothing copied."""
    weight, bias, epilogue = spec.weight, spec.bias, spec.epilogue
    return lambda *args: epilogue.apply_(F.linear(args[0], weight, bias), args)


class AtenLinear:
    """torch's linear on [N, K] weights, epilogue in place."""

    name = "aten-linear"

    def match(self, region: RegionView) -> list[Config] | str:
        spec = read_linear(region)
        return spec if isinstance(spec, str) else [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        spec = read_linear(region)
        assert isinstance(spec, LinearSpec)
        return Kernel(aten_linear(replace(spec, weight=spec.weight.contiguous())))


class AtenMatMul:
    """A single product of two computed tensors, able to write into the arena."""

    name = "aten-matmul"

    def match(self, region: RegionView) -> list[Config] | str:
        node = region.node
        if node.op_type != "MatMul" or node.domain or len(region.nodes) != 1:
            return "not a single MatMul"
        if any(v is None or v.dtype is None or not v.dtype.is_floating_point() for v in node.inputs):
            return "not floating point"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        a, b = (region.constant(v) for v in region.formal)
        if a is None and b is None:
            return Kernel(torch.matmul, lambda x, y, out: torch.matmul(x, y, out=out))
        if a is None:
            return Kernel(lambda x: torch.matmul(x, b), lambda x, out: torch.matmul(x, b, out=out))
        return Kernel(lambda x: torch.matmul(a, x), lambda x, out: torch.matmul(a, x, out=out))
