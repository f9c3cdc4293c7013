"""Activations: pointwise with attributes, plus softmax-like ones along an axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from venturi.ops.table import CONTRIB, POINTWISE, REDUCE, op

T = torch.Tensor


@op("Relu", POINTWISE, ulps=0.0)
def relu(x: T) -> T:
    return torch.relu(x)


@op("LeakyRelu", POINTWISE)
def leaky_relu(x: T, *, alpha: float = 0.01) -> T:
    return F.leaky_relu(x, alpha)


@op("PRelu", POINTWISE)
def prelu(x: T, slope: T) -> T:
    return torch.where(x < 0, (x * slope).to(x.dtype), x)


@op("ThresholdedRelu", POINTWISE)
def thresholded_relu(x: T, *, alpha: float = 1.0) -> T:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@op("Elu", POINTWISE, ulps=16)
def elu(x: T, *, alpha: float = 1.0) -> T:
    return F.elu(x, alpha)


@op("Celu", POINTWISE, ulps=16)
def celu(x: T, *, alpha: float = 1.0) -> T:
    return F.celu(x, alpha)


@op("Selu", POINTWISE, ulps=16)
def selu(x: T, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> T:
    return torch.where(x > 0, gamma * x, gamma * alpha * torch.expm1(x)).to(x.dtype)


@op("Softplus", POINTWISE, ulps=16)
def softplus(x: T) -> T:
    return F.softplus(x, threshold=40.0)


@op("Softsign", POINTWISE)
def softsign(x: T) -> T:
    return F.softsign(x)


@op("HardSigmoid", POINTWISE)
def hard_sigmoid(x: T, *, alpha: float = 0.2, beta: float = 0.5) -> T:
    return torch.clamp(alpha * x + beta, 0, 1)


@op("HardSwish", POINTWISE)
def hard_swish(x: T) -> T:
    return F.hardswish(x)


@op("Mish", POINTWISE, ulps=16)
def mish(x: T) -> T:
    return F.mish(x)


@op("Swish", POINTWISE, ulps=16)
def swish(x: T, *, alpha: float = 1.0) -> T:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@op("QuickGelu", POINTWISE, domain=CONTRIB, ulps=16)
def quick_gelu(x: T, *, alpha: float = 1.702) -> T:
    return x * torch.sigmoid(alpha * x)


@op("Gelu", POINTWISE, ulps=16)
def gelu(x: T, *, approximate: str = "none") -> T:
    return F.gelu(x, approximate=approximate)


@op("SwiGLU", POINTWISE, ulps=16)
def swiglu(gate: T, x: T, *, alpha: float = 1.0) -> T:
    return swish(gate, alpha=alpha) * x


@op("Shrink", POINTWISE)
def shrink(x: T, *, bias: float = 0.0, lambd: float = 0.5) -> T:
    if not x.dtype.is_signed:
        x_wide = x.to(torch.int32)
        return shrink(x_wide, bias=bias, lambd=lambd).to(x.dtype)
    zero = torch.zeros_like(x)
    low = torch.where(x < -lambd, (x + bias).to(x.dtype), zero)
    return torch.where(x > lambd, (x - bias).to(x.dtype), low)


@op("Clip", POINTWISE, ulps=0.0)
def clip(x: T, low: T | None = None, high: T | None = None) -> T:
    unsigned = x.dtype in (torch.uint16, torch.uint32, torch.uint64)
    y = x.to(torch.int64) if unsigned else x
    if low is not None:
        y = torch.maximum(y, low.to(y.dtype))
    if high is not None:
        y = torch.minimum(y, high.to(y.dtype))
    return y.to(x.dtype)


@op("Softmax", REDUCE, ulps=16)
def softmax(x: T, *, axis: int = -1) -> T:
    return torch.softmax(x, axis)


@op("LogSoftmax", REDUCE, ulps=16)
def log_softmax(x: T, *, axis: int = -1) -> T:
    return torch.log_softmax(x, axis)


@op("Hardmax", REDUCE, ulps=0.0)
def hardmax(x: T, *, axis: int = -1) -> T:
    return torch.zeros_like(x).scatter_(axis, x.argmax(axis, keepdim=True), 1)


@op("BiasGelu", POINTWISE, domain=CONTRIB, ulps=16)
def bias_gelu(x: T, bias: T) -> T:
    return F.gelu(x + bias)


@op("FastGelu", POINTWISE, domain=CONTRIB, ulps=16)
def fast_gelu(x: T, bias: T | None = None) -> T:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("Gelu", POINTWISE, domain=CONTRIB, ulps=16)
def contrib_gelu(x: T) -> T:
    return F.gelu(x)


@op("BiasSoftmax", REDUCE, domain=CONTRIB, ulps=16)
def bias_softmax(x: T, bias: T, *, axis: int = 1, is_inner_broadcast: int = 1) -> T:
    axis = axis % x.dim()
    if not is_inner_broadcast and bias.dim() == x.dim():
        bias = bias.expand_as(x)
    flat = (x + bias).flatten(axis)
    return torch.softmax(flat, -1).reshape(x.shape)


@op("Dropout")
def dropout(x: T, ratio: T | None = None, training_mode: T | None = None, *, seed: int | None = None) -> tuple[T, T]:
    p = 0.5 if ratio is None else float(ratio)
    if training_mode is None or not bool(training_mode) or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    generator = torch.Generator(device=x.device)
    generator.manual_seed(0 if seed is None else seed)
    mask = torch.rand(x.shape, generator=generator, device=x.device) >= p
    scale = 0.0 if math.isclose(p, 1.0) else 1.0 / (1.0 - p)
    return torch.where(mask, x * scale, torch.zeros_like(x)).to(x.dtype), mask
