"""Activations of feed-forward layers, and the gated product act(gate) * up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from venturi.kernels.quantize import ScaledRows, quantize_rows


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "relu": F.relu,
}


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate_up[..., :n]) * gate_up[..., n:], shape [..., 2n] -> [..., n]."""
    if gate_up.is_cuda and activation in ("silu", "swish", "gelu_pytorch_tanh", "gelu_new"):
        from venturi.kernels.triton_kernels.activations import gated as on_device

        return on_device(gate_up, "silu" if activation in ("silu", "swish") else "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


def gated_fp8(gate_up: Tensor, activation: str) -> ScaledRows:
    """`gated` of [rows, 2n] with the result in fp8, one scale a row: one pass over memory on CUDA."""
    if gate_up.is_cuda and activation in ("silu", "swish", "gelu_pytorch_tanh", "gelu_new"):
        from venturi.kernels.triton_kernels.activations import MAX_ROW
        from venturi.kernels.triton_kernels.activations import gated_fp8 as on_device

        if gate_up.shape[-1] <= 2 * MAX_ROW:
            return ScaledRows(*on_device(gate_up, "silu" if activation in ("silu", "swish") else "gelu_tanh"))
    return quantize_rows(gated(gate_up, activation))


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate <= limit, |up| <= limit; gate and up alternate in the last axis."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())
