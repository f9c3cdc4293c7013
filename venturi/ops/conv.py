"""Convolutions of 1, 2 and 3 spatial dimensions, transposed, integer and deformable."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.ops.table import CONTRACT, Shapes, op

T = torch.Tensor


def _conv_flops(ins: Shapes, outs: Shapes, attrs: dict[str, Any]) -> float:
    return 2.0 * float(np.prod(outs[0], dtype=np.float64)) * float(np.prod(ins[1][1:], dtype=np.float64))


def _transpose_flops(ins: Shapes, outs: Shapes, attrs: dict[str, Any]) -> float:
    return 2.0 * float(np.prod(ins[0], dtype=np.float64)) * float(np.prod(ins[1][1:], dtype=np.float64))


def resolve_pads(
    auto_pad: str,
    sizes: list[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int] | None,
) -> list[int]:
    """Explicit padding [begin..., end...] for every auto_pad mode.

    >>> resolve_pads("SAME_UPPER", [5], [2], [2], [1], None)
    [0, 1]
    """
    n = len(kernel)
    if auto_pad in ("NOTSET", ""):
        return list(pads) if pads else [0] * 2 * n
    if auto_pad == "VALID":
        return [0] * 2 * n
    begin, end = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small, big = total // 2, total - total // 2
        begin.append(small if auto_pad == "SAME_UPPER" else big)
        end.append(big if auto_pad == "SAME_UPPER" else small)
    return begin + end


def split_pads(x: T, pads: list[int], value: float = 0.0) -> tuple[T, list[int]]:
    """Keep symmetric padding for the kernel; apply asymmetric or negative padding to `x` now."""
    n = len(pads) // 2
    if pads[:n] == pads[n:] and min(pads, default=0) >= 0:
        return x, pads[:n]
    flat = [p for i in reversed(range(n)) for p in (pads[i], pads[i + n])]
    return F.pad(x, flat, value=value), [0] * n


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("Conv", CONTRACT, ulps=64, flops=_conv_flops)
def conv(
    x: T,
    w: T,
    b: T | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    n = w.dim() - 2
    strides, dilations = strides or [1] * n, dilations or [1] * n
    pads = resolve_pads(auto_pad, list(x.shape[2:]), list(w.shape[2:]), strides, dilations, pads)
    x, even = split_pads(x, pads)
    if x.numel() == 0:
        sizes = [
            (s + 2 * p - d * (k - 1) - 1) // st + 1
            for s, p, d, k, st in zip(x.shape[2:], even, dilations, w.shape[2:], strides)
        ]
        return torch.zeros([x.shape[0], w.shape[0], *sizes], dtype=x.dtype, device=x.device)
    return CONV[n](x, w, b, strides, even, dilations, group)


@op("ConvTranspose", CONTRACT, ulps=64, flops=_transpose_flops)
def conv_transpose(
    x: T,
    w: T,
    b: T | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    """Computes the full product without padding, then crops (or extends) to the requested window."""
    n = w.dim() - 2
    strides, dilations = strides or [1] * n, dilations or [1] * n
    extra = output_padding or [0] * n
    kernel = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations)]
    full = [(s - 1) * st + k for s, st, k in zip(x.shape[2:], strides, kernel)]
    if output_shape is not None:
        begin, size = [], list(output_shape[-n:])
        for i in range(n):
            total = full[i] + extra[i] - size[i]
            small = total // 2 if total > 0 else 0
            begin.append(small if auto_pad != "SAME_LOWER" else max(total, 0) - small)
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        size = [s * st for s, st in zip(x.shape[2:], strides)]
        total_pads = [f + e - s for f, e, s in zip(full, extra, size)]
        begin = [max(t, 0) // 2 if auto_pad == "SAME_UPPER" else max(t, 0) - max(t, 0) // 2 for t in total_pads]
    else:
        p = list(pads) if pads else [0] * 2 * n
        begin = p[:n]
        size = [f + e - p[i] - p[i + n] for i, (f, e) in enumerate(zip(full, extra))]
    y = CONV_TRANSPOSE[n](x, w, None, strides, 0, 0, group, dilations)
    crop = [v for i in reversed(range(n)) for v in (-begin[i], size[i] - full[i] + begin[i])]
    y = F.pad(y, crop)
    return y if b is None else y + b.reshape(1, -1, *[1] * n)


@op("ConvInteger", CONTRACT, ulps=0.0, flops=_conv_flops)
def conv_integer(x: T, w: T, x_zero: T | None = None, w_zero: T | None = None, **attrs: Any) -> T:
    a = x.to(torch.int32) - (0 if x_zero is None else x_zero.to(torch.int32))
    zero: Any = 0
    if w_zero is not None:
        zero = w_zero.to(torch.int32)
        zero = zero.reshape(-1, *[1] * (w.dim() - 1)) if zero.dim() else zero
    return conv(a.double(), (w.to(torch.int32) - zero).double(), **attrs).to(torch.int32)


@op("DeformConv", CONTRACT, ulps=64)
def deform_conv(
    x: T,
    w: T,
    offset: T,
    b: T | None = None,
    mask: T | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    """Deformable convolution v2 (2-D): sample each kernel tap bilinearly at its offset, then contract."""
    st, dl, p = strides or [1, 1], dilations or [1, 1], pads or [0] * 4
    (n, c, h, width), (m, _, kh, kw) = x.shape, w.shape
    oh, ow = offset.shape[2:]
    off = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    tap = torch.arange(kh * kw, device=x.device)
    base_y = (torch.arange(oh, device=x.device) * st[0] - p[0])[None, :, None] + (tap // kw * dl[0])[:, None, None]
    base_x = (torch.arange(ow, device=x.device) * st[1] - p[1])[None, None, :] + (tap % kw * dl[1])[:, None, None]
    y, xx = base_y + off[:, :, :, 0], base_x + off[:, :, :, 1]
    grid = torch.stack([2 * xx / max(width - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1], -1)
    source = x.reshape(n * offset_group, c // offset_group, h, width)
    flat_grid = grid.reshape(n * offset_group, kh * kw * oh, ow, 2).to(x.dtype)
    taken = F.grid_sample(source, flat_grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    taken = taken.reshape(n, offset_group, c // offset_group, kh * kw, oh, ow)
    if mask is not None:
        taken = taken * mask.reshape(n, offset_group, 1, kh * kw, oh, ow)
    columns = taken.reshape(n, group, c // group, kh * kw, oh, ow)
    out = torch.einsum("ngckyx,gmck->ngmyx", columns, w.reshape(group, m // group, c // group, kh * kw))
    out = out.reshape(n, m, oh, ow)
    return out if b is None else out + b.reshape(1, -1, 1, 1)


@op("CausalConvWithState", ulps=64)
def causal_conv_with_state(
    x: T, w: T, b: T | None = None, past: T | None = None, *, activation: str = "none"
) -> tuple[T, T]:
    """Depthwise causal convolution over [batch, channels, time], carrying the last k-1 inputs."""
    k = w.shape[-1]
    state = x.new_zeros(x.shape[0], x.shape[1], k - 1) if past is None else past
    joined = torch.cat([state, x], -1)
    y = F.conv1d(joined, w.reshape(x.shape[1], 1, k), b, groups=x.shape[1])
    y = F.silu(y) if activation in ("silu", "swish") else y
    return y, joined[..., joined.shape[-1] - (k - 1) :]


@op("Col2Im", ulps=16)
def col2im(
    x: T,
    image_shape: T,
    block_shape: T,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    image, block = image_shape.tolist(), block_shape.tolist()
    n = len(image)
    dl, st, p = dilations or [1] * n, strides or [1] * n, pads or [0] * 2 * n
    size = [s + p[i] + p[i + n] for i, s in enumerate(image)]
    steps = [(size[i] - dl[i] * (block[i] - 1) - 1) // st[i] + 1 for i in range(n)]
    batch, channels = x.shape[0], x.shape[1] // int(np.prod(block))
    flat_index = torch.zeros([1] * 2 * n, dtype=torch.int64, device=x.device)
    for i in range(n):
        taps, starts = (torch.arange(k, device=x.device) for k in (block[i], steps[i]))
        along = (taps * dl[i])[:, None] + (starts * st[i])[None]
        shape = [1] * 2 * n
        shape[i], shape[i + n] = block[i], steps[i]
        flat_index = flat_index * size[i] + along.reshape(shape)
    out = x.new_zeros(batch, channels, int(np.prod(size)))
    out.index_add_(2, flat_index.reshape(-1), x.reshape(batch, channels, -1))
    out = out.reshape(batch, channels, *size)
    for i in range(n):
        out = out.narrow(i + 2, p[i], image[i])
    return out
