"""Pooling. Windows are gathered by explicit indices, so that every ONNX attribute has one meaning for all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.ops.conv import resolve_pads
from venturi.ops.table import REDUCE, op

T = torch.Tensor


class Window:
    """Geometry of one pooling: output sizes and padding, the end padded further for ceil_mode."""

    def __init__(self, x: T, kernel: list[int], attrs: dict[str, Any]) -> None:
        n = len(kernel)
        sizes = list(x.shape[2:])
        self.kernel = kernel
        self.strides: list[int] = attrs.get("strides") or [1] * n
        self.dilations: list[int] = attrs.get("dilations") or [1] * n
        self.pads = resolve_pads(
            attrs.get("auto_pad", "NOTSET"), sizes, kernel, self.strides, self.dilations, attrs.get("pads")
        )
        self.out = [self._size(i, sizes[i], bool(attrs.get("ceil_mode"))) for i in range(n)]
        self.extent = [(self.out[i] - 1) * self.strides[i] + (kernel[i] - 1) * self.dilations[i] + 1 for i in range(n)]

    def _size(self, i: int, size: int, ceil: bool) -> int:
        """A window that would start in the end padding is dropped."""
        n = len(self.kernel)
        room = size + self.pads[i] + self.pads[i + n] - self.dilations[i] * (self.kernel[i] - 1) - 1
        count = (-(-room // self.strides[i]) if ceil else room // self.strides[i]) + 1
        if ceil and (count - 1) * self.strides[i] >= size + self.pads[i]:
            count -= 1
        return count

    def unfold(self, x: T, fill: float) -> T:
        """[N, C, *out, prod(kernel)] of padded `x`."""
        n = len(self.kernel)
        flat: list[int] = []
        for i in reversed(range(n)):
            flat += [self.pads[i], self.extent[i] - x.shape[i + 2] - self.pads[i]]
        x = F.pad(x, flat, value=fill)
        for i in range(n):
            index = (torch.arange(self.out[i]) * self.strides[i])[:, None] + (
                torch.arange(self.kernel[i]) * self.dilations[i]
            )[None]
            x = x.index_select(2 + i, index.reshape(-1).to(x.device))
        shape = list(x.shape[:2])
        for i in range(n):
            shape += [self.out[i], self.kernel[i]]
        order = [0, 1, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2)]
        return x.reshape(shape).permute(order).flatten(2 + n)


_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _plain(w: Window, x: T) -> bool:
    """True when torch's own pooling has the same windows."""
    n = len(w.kernel)
    even = w.pads[:n] == w.pads[n:] and all(2 * p <= k for p, k in zip(w.pads, w.kernel))
    floor = [
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, p, d, k, st in zip(x.shape[2:], w.pads, w.dilations, w.kernel, w.strides)
    ]
    return even and floor == w.out and x.dtype.is_floating_point and n in _MAXIMUM


@op("MaxPool", REDUCE, ulps=0.0)
def max_pool(
    x: T,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    ctx: Any = None,
) -> Any:
    attrs = {
        "auto_pad": auto_pad,
        "ceil_mode": ceil_mode,
        "dilations": dilations,
        "pads": pads,
        "strides": strides,
    }
    w = Window(x, kernel_shape, attrs)
    n = len(kernel_shape)
    if (ctx is None or ctx.num_outputs < 2) and _plain(w, x):
        return _MAXIMUM[n](x, w.kernel, w.strides, w.pads[:n], w.dilations)
    lowest = -np.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    windows = w.unfold(x, lowest)
    values, which = windows.max(-1)
    if ctx is None or ctx.num_outputs < 2:
        return values
    return values, _flat_index(x, w, which, storage_order)


def _flat_index(x: T, w: Window, which: T, storage_order: int) -> T:
    """Index of each maximum in the flattened input."""
    n = len(w.kernel)
    position = which
    coordinates: list[T] = []
    for i in reversed(range(n)):
        tap = position % w.kernel[i]
        position = position // w.kernel[i]
        shape = [1] * which.dim()
        shape[2 + i] = w.out[i]
        start = (torch.arange(w.out[i], device=which.device) * w.strides[i] - w.pads[i]).reshape(shape)
        coordinates.insert(0, start + tap * w.dilations[i])
    flat = torch.zeros_like(which)
    sizes = list(x.shape[2:])
    order = range(n) if storage_order == 0 else reversed(range(n))
    for i in order:
        flat = flat * sizes[i] + coordinates[i]
    plane = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * n)
    return flat + plane * int(np.prod(sizes))


@op("AveragePool", REDUCE, ulps=16)
def average_pool(
    x: T,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    attrs = {
        "auto_pad": auto_pad,
        "ceil_mode": ceil_mode,
        "dilations": dilations,
        "pads": pads,
        "strides": strides,
    }
    w = Window(x, kernel_shape, attrs)
    n = len(kernel_shape)
    if _plain(w, x) and all(d == 1 for d in w.dilations):
        return _AVERAGE[n](x, w.kernel, w.strides, w.pads[:n], False, bool(count_include_pad))
    inside = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if count_include_pad:
        flat = [p for i in reversed(range(n)) for p in (w.pads[i], w.pads[i + n])]
        inside = F.pad(inside, flat, value=1.0)
        w_pads, w.pads = w.pads, [0] * 2 * n
        count = w.unfold(inside, 0.0).sum(-1)
        w.pads = w_pads
    else:
        count = w.unfold(inside, 0.0).sum(-1)
    return (w.unfold(x, 0.0).sum(-1) / count).to(x.dtype)


@op("LpPool", REDUCE, ulps=32)
def lp_pool(x: T, *, kernel_shape: list[int], p: int = 2, **attrs: Any) -> T:
    w = Window(x, kernel_shape, attrs)
    return w.unfold(x, 0.0).abs().pow(p).sum(-1).pow(1.0 / p).to(x.dtype)


@op("GlobalAveragePool", REDUCE, ulps=16)
def global_average_pool(x: T) -> T:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool", REDUCE, ulps=0.0)
def global_max_pool(x: T) -> T:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@op("GlobalLpPool", REDUCE, ulps=32)
def global_lp_pool(x: T, *, p: int = 2) -> T:
    return x.abs().pow(p).sum(tuple(range(2, x.dim())), keepdim=True).pow(1.0 / p)
