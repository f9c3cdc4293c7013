"""Quantize, dequantize and the integer operators built from them."""

from __future__ import annotations

from typing import Any

import torch

from venturi.ir.dtypes import DT, INTS, integer_range
from venturi.ops.cast import convert
from venturi.ops.conv import conv
from venturi.ops.table import CONTRACT, CONTRIB, OpContext, op
from venturi.ops.tensors import STORAGE, logical_dtype, widen

T = torch.Tensor


def _align(p: T, x: T, axis: int, block_size: int) -> T:
    """Broadcast a scale or zero point over `x`: per tensor, per axis, or per block along the axis."""
    if p.dim() == 0 or (p.numel() == 1 and block_size == 0):
        return p.reshape([1] * x.dim())
    axis %= x.dim()
    if block_size:
        return p.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return p.reshape(shape)


@op("QuantizeLinear", ulps=1.0)
def quantize_linear(
    x: T,
    scale: T,
    zero: T | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    ctx: OpContext | None = None,
) -> Any:
    target = DT(output_dtype) if output_dtype else DT.UINT8
    if zero is not None:
        target = (ctx.in_dtypes[2] if ctx else None) or logical_dtype(zero)
    s = _align(scale, x, axis, block_size)
    wide = STORAGE[DT(precision)] if precision else torch.promote_types(widen(x).dtype, torch.float32)
    y = x.to(wide) / widen(s).to(wide)
    z = None if zero is None else _align(widen(zero), x, axis, block_size)
    if target in INTS or target in (DT.INT4, DT.UINT4, DT.INT2, DT.UINT2):
        low, high = integer_range(target)
        y = torch.round(y)
        y = y if z is None else y + z
        y = torch.nan_to_num(y, nan=0.0)
        return y.clamp(low, high).to(STORAGE[target])
    y = y if z is None else y + z
    return convert(y.float(), DT.FLOAT, target, saturate=bool(saturate))


@op("DequantizeLinear", ulps=2.0)
def dequantize_linear(
    x: T, scale: T, zero: T | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> T:
    target = STORAGE[DT(output_dtype)] if output_dtype else scale.dtype
    wide = x.float() if x.dtype.is_floating_point else x.to(torch.int32)
    if zero is not None:
        z = _align(zero.float() if zero.dtype.is_floating_point else zero.to(torch.int32), x, axis, block_size)
        wide = wide - z
    s = _align(widen(scale), x, axis, block_size)
    return (wide.to(s.dtype) * s).to(target)


@op("DynamicQuantizeLinear", ulps=1.0)
def dynamic_quantize_linear(x: T) -> tuple[T, T, T]:
    low = torch.clamp(x.amin(), max=0.0) if x.numel() else x.new_zeros(())
    high = torch.clamp(x.amax(), min=0.0) if x.numel() else x.new_zeros(())
    scale = (high - low) / 255.0
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / safe).clamp(0, 255).to(torch.uint8)
    return quantize_linear(x, safe, zero), scale, zero


def _requantize(y: T, scale: T, zero: T | None, target: torch.dtype) -> T:
    """round(y / scale) + zero, saturated to `target`."""
    limits = torch.iinfo(target)
    offset = 0 if zero is None else zero.to(torch.int64)
    return (torch.round(y / scale).double() + offset).clamp(limits.min, limits.max).to(target)


@op("QLinearMatMul", CONTRACT, ulps=1.0)
def qlinear_matmul(a: T, a_scale: T, a_zero: T, b: T, b_scale: T, b_zero: T, y_scale: T, y_zero: T) -> Any:
    def real(x: T, scale: T, zero: T, axis: int) -> T:
        if zero.dim() == 1 and zero.numel() > 1 and x.dim() >= 2:
            shape = [1] * x.dim()
            shape[axis] = -1
            zero, scale = zero.reshape(shape), scale.reshape(shape)
        return (x.double() - zero.double()) * scale.double()

    product = torch.matmul(real(a, a_scale, a_zero, -2), real(b, b_scale, b_zero, -1))
    if y_zero.dtype.is_floating_point:
        return convert((product / y_scale.double()).float() + y_zero.float(), DT.FLOAT, logical_dtype(y_zero))
    return _requantize(product, y_scale.double(), y_zero, y_zero.dtype)


@op("QLinearConv", CONTRACT, ulps=1.0)
def qlinear_conv(
    x: T,
    x_scale: T,
    x_zero: T,
    w: T,
    w_scale: T,
    w_zero: T,
    y_scale: T,
    y_zero: T,
    bias: T | None = None,
    **attrs: Any,
) -> T:
    per_channel = [-1, *[1] * (w.dim() - 1)]
    wz = w_zero.double().reshape(per_channel) if w_zero.numel() > 1 else w_zero.double().reshape(())
    y = conv(x.double() - x_zero.double().reshape(()), w.double() - wz, None, **attrs)
    out_shape = [1, -1, *[1] * (w.dim() - 2)]
    if bias is not None:
        y = y + bias.double().reshape(out_shape)
    scale = x_scale.double().reshape(()) * w_scale.double().reshape(out_shape if w_scale.numel() > 1 else ())
    return _requantize(y * scale, y_scale.double().reshape(()), y_zero.reshape(()), y_zero.dtype)


def _qlinear_binary(name: str, fn: Any) -> None:
    def reference(
        a: T,
        a_scale: T,
        a_zero: T | None,
        b: T,
        b_scale: T,
        b_zero: T | None,
        c_scale: T,
        c_zero: T | None = None,
    ) -> T:
        x = dequantize_linear(a, a_scale.float(), a_zero)
        y = dequantize_linear(b, b_scale.float(), b_zero)
        return _requantize(fn(x, y), c_scale, c_zero, a.dtype)

    op(name, domain=CONTRIB, ulps=1.0)(reference)


_qlinear_binary("QLinearAdd", torch.add)
_qlinear_binary("QLinearMul", torch.mul)


@op("QLinearSigmoid", domain=CONTRIB, ulps=1.0)
def qlinear_sigmoid(x: T, x_scale: T, x_zero: T | None, y_scale: T, y_zero: T | None = None) -> T:
    return _requantize(torch.sigmoid(dequantize_linear(x, x_scale, x_zero)), y_scale, y_zero, x.dtype)


@op("QLinearLeakyRelu", domain=CONTRIB, ulps=1.0)
def qlinear_leaky_relu(
    x: T, x_scale: T, x_zero: T | None, y_scale: T, y_zero: T | None = None, *, alpha: float = 0.01
) -> T:
    y = torch.nn.functional.leaky_relu(dequantize_linear(x, x_scale, x_zero), alpha)
    return _requantize(y, y_scale, y_zero, x.dtype)


@op("QLinearGlobalAveragePool", domain=CONTRIB, ulps=1.0)
def qlinear_global_average_pool(x: T, x_scale: T, x_zero: T, y_scale: T, y_zero: T, *, channels_last: int = 0) -> T:
    dims = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return _requantize(dequantize_linear(x, x_scale, x_zero).mean(dims, keepdim=True), y_scale, y_zero, x.dtype)


@op("QLinearConcat", domain=CONTRIB, ulps=1.0)
def qlinear_concat(y_scale: T, y_zero: T, *parts: T, axis: int) -> T:
    wide = [dequantize_linear(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return _requantize(torch.cat(wide, axis), y_scale, y_zero, y_zero.dtype)


@op("QGemm", CONTRACT, domain=CONTRIB, ulps=1.0)
def qgemm(
    a: T,
    a_scale: T,
    a_zero: T,
    b: T,
    b_scale: T,
    b_zero: T,
    c: T | None = None,
    y_scale: T | None = None,
    y_zero: T | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> T:
    x = a.double() - a_zero.double()
    w = b.double() - (b_zero.double().reshape(-1, 1) if transB and b_zero.numel() > 1 else b_zero.double())
    y = torch.matmul(x.T if transA else x, w.T if transB else w)
    y = y if c is None else y + c.double()
    real = y * alpha * a_scale.double() * b_scale.double()
    return real.float() if y_scale is None else _requantize(real, y_scale.double(), y_zero, a.dtype)


@op("MatMulIntegerToFloat", CONTRACT, domain=CONTRIB, ulps=8.0)
def matmul_integer_to_float(
    a: T,
    b: T,
    a_scale: T,
    b_scale: T,
    a_zero: T | None = None,
    b_zero: T | None = None,
    bias: T | None = None,
) -> T:
    x = a.double() - (0 if a_zero is None else a_zero.double())
    w = b.double() - (0 if b_zero is None else b_zero.double())
    y = (torch.matmul(x, w) * a_scale.double() * b_scale.double()).to(a_scale.dtype)
    return y if bias is None else y + bias


@op("DynamicQuantizeMatMul", CONTRACT, domain=CONTRIB, ulps=8.0)
def dynamic_quantize_matmul(a: T, b: T, b_scale: T, b_zero: T | None = None, bias: T | None = None) -> T:
    q, scale, zero = dynamic_quantize_linear(a)
    return matmul_integer_to_float(q, b, scale, b_scale, zero, b_zero, bias)


@op("MatMulNBits", CONTRACT, domain=CONTRIB, ulps=64)
def matmul_nbits(
    a: T,
    b: T,
    scales: T,
    zeros: T | None = None,
    g_idx: T | None = None,
    bias: T | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
) -> T:
    """Weights [N, blocks, block_size*bits/8] packed low bits first; one scale (and zero point) a block."""
    w = unpack_bits(b, bits).reshape(N, -1)[:, :K].float()
    blocks = -(-K // block_size)
    index = torch.arange(K, device=a.device) // block_size if g_idx is None else g_idx.long()
    s = scales.reshape(N, blocks).float()[:, index]
    if zeros is None:
        z: T | float = float(1 << (bits - 1))
    elif zeros.dtype == torch.uint8:
        z = unpack_bits(zeros.reshape(N, -1), bits)[:, :blocks].float()[:, index]
    else:
        z = zeros.reshape(N, blocks).float()[:, index]
    y = torch.matmul(a.float(), ((w - z) * s).T).to(a.dtype)
    return y if bias is None else y + bias


def unpack_bits(x: T, bits: int) -> T:
    """uint8 [..., n] → uint8 [..., n*8/bits], low bits first."""
    if bits == 8:
        return x
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    return ((x[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
