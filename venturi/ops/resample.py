"""Resize, grid sampling and region pooling: everything that reads an image at fractional positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.ops.table import op

T = torch.Tensor


def _source(i: Any, scale: float, size_in: int, size_out: float, mode: str, roi: tuple[float, float]) -> Any:
    """Where output position i reads, per ONNX Resize's coordinate_transformation_mode."""
    if mode == "align_corners":
        return np.zeros_like(i) if size_out <= 1 else i * (size_in - 1) / (size_out - 1)
    if mode == "asymmetric":
        return i / scale
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if size_out > 1 else np.zeros_like(i)
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode == "half_pixel_symmetric":
        adjust = math.floor(size_out) / (scale * size_in)
        return size_in / 2 * (1 - adjust) + (i + 0.5) / scale - 0.5
    if mode == "tf_crop_and_resize":
        start, end = roi
        if size_out > 1:
            return start * (size_in - 1) + i * (end - start) * (size_in - 1) / (size_out - 1)
        return 0.5 * (start + end) * (size_in - 1) + i * 0
    return (i + 0.5) / scale - 0.5


def _kernel(distance: Any, mode: str, a: float) -> Any:
    d = np.abs(distance)
    if mode == "linear":
        return np.maximum(0.0, 1.0 - d)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _nearest(x: Any, mode: str) -> Any:
    if mode == "round_prefer_floor":
        return np.ceil(x - 0.5)
    if mode == "round_prefer_ceil":
        return np.floor(x + 0.5)
    return np.floor(x) if mode == "floor" else np.ceil(x)


def resize_matrix(size_in: int, size_out: int, scale: float, spec: dict[str, Any], roi: tuple[float, float]) -> Any:
    """[size_out, size_in] weights of one axis, and which outputs lie outside (for extrapolation)."""
    length_out = scale * size_in if spec["exact"] else size_out
    i = np.arange(size_out, dtype=np.float64)
    x = _source(i, scale, size_in, length_out, spec["coordinates"], roi)
    outside = (x < 0) | (x > size_in - 1) if spec["coordinates"] == "tf_crop_and_resize" else np.zeros(size_out, bool)
    weights = np.zeros((size_out, size_in))
    if spec["mode"] == "nearest":
        index = np.clip(_nearest(x, spec["nearest"]), 0, size_in - 1).astype(np.int64)
        weights[np.arange(size_out), index] = 1.0
        return weights, outside
    stretch = max(1.0, 1.0 / scale) if spec["antialias"] else 1.0
    reach = (1 if spec["mode"] == "linear" else 2) * stretch
    for o in range(size_out):
        taps = np.arange(math.floor(x[o] - reach), math.ceil(x[o] + reach) + 1)
        w = _kernel((taps - x[o]) / stretch, spec["mode"], spec["cubic"])
        valid = (taps >= 0) & (taps < size_in)
        if spec["exclude"]:
            w = np.where(valid, w, 0.0)
        w = w / w.sum() if spec["exclude"] or spec["antialias"] else w
        np.add.at(weights[o], np.clip(taps, 0, size_in - 1), w)
    return weights, outside


@op("Resize", ulps=64)
def resize(
    x: T,
    roi: T | None = None,
    scales: T | None = None,
    sizes: T | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> T:
    """Separable resampling: one weight matrix an axis, applied in turn."""
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    given = scales is not None and scales.numel() > 0
    if given:
        assert scales is not None
        factors = [float(s) for s in scales.tolist()]
        out = [math.floor(x.shape[d] * f) for d, f in zip(dims, factors)]
    else:
        assert sizes is not None, "Resize needs scales or sizes"
        out = [int(s) for s in sizes.tolist()]
        factors = [o / x.shape[d] if x.shape[d] else 1.0 for o, d in zip(out, dims)]
        if keep_aspect_ratio_policy != "stretch":
            pick = min if keep_aspect_ratio_policy == "not_larger" else max
            factors = [pick(factors)] * len(dims)
            out = [int(np.floor(f * x.shape[d] + 0.5)) for f, d in zip(factors, dims)]
    spec = {
        "coordinates": coordinate_transformation_mode, "mode": mode, "nearest": nearest_mode, "cubic": cubic_coeff_a,
        "exclude": bool(exclude_outside), "antialias": bool(antialias), "exact": given,
    }  # fmt: skip
    dtype, y = x.dtype, x if x.dtype == torch.float64 or mode == "nearest" else x.float()
    blank = torch.zeros([1] * x.dim(), dtype=torch.bool)
    for n, (d, size, f) in enumerate(zip(dims, out, factors)):
        region = (0.0, 1.0)
        if roi is not None and roi.numel():
            region = (float(roi.reshape(-1)[n]), float(roi.reshape(-1)[n + len(dims)]))
        if size == x.shape[d] and f == 1.0 and coordinate_transformation_mode != "tf_crop_and_resize":
            continue
        weights, outside = resize_matrix(x.shape[d], size, f, spec, region)
        if mode == "nearest":
            y = y.index_select(d, torch.from_numpy(weights.argmax(1)).to(y.device))
        else:
            y = torch.tensordot(y, torch.from_numpy(weights).to(y), dims=([d], [1])).movedim(-1, d)  # type: ignore[no-untyped-call]
        shape = [1] * x.dim()
        shape[d] = size
        blank = blank | torch.from_numpy(outside).reshape(shape)
    if blank.any():
        y = torch.where(blank.to(y.device), torch.full_like(y, extrapolation_value), y)
    if not dtype.is_floating_point and y.dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        y = y.round().clamp(limits.min, limits.max)
    return y.to(dtype)


@op("Upsample", ulps=16)
def upsample(x: T, scales: T, *, mode: str = "nearest") -> T:
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@op("GridSample", ulps=64)
def grid_sample(x: T, grid: T, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros") -> T:
    if mode == "cubic" and x.dim() == 5:
        return _grid_sample_nd(x, grid, bool(align_corners), padding_mode)
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid.to(x.dtype), mode=name, padding_mode=padding_mode, align_corners=bool(align_corners))


def _grid_sample_nd(x: T, grid: T, align: bool, padding: str) -> T:
    """Cubic sampling of any rank by 4 taps an axis."""
    n = x.dim() - 2
    out = x.new_zeros([x.shape[0], x.shape[1], *grid.shape[1:-1]])
    points = grid.flip(-1)
    base, weights = [], []
    for i in range(n):
        size = x.shape[2 + i]
        p = (points[..., i] + 1) / 2 * (size - 1) if align else ((points[..., i] + 1) * size - 1) / 2
        low = torch.floor(p)
        base.append(low.long() - 1)
        taps = torch.stack([p - low + 1, p - low, 1 - (p - low), 2 - (p - low)], -1)
        weights.append(torch.from_numpy(_kernel(taps.numpy(), "cubic", -0.75)).to(x.dtype))
    for flat in range(4**n):
        taps_i = [flat // 4**i % 4 for i in range(n)]
        index, w, valid = [], torch.ones_like(weights[0][..., 0]), torch.ones_like(base[0], dtype=torch.bool)
        for i, t in enumerate(taps_i):
            at, ok = _border(base[i] + t, x.shape[2 + i], padding, align)
            index.append(at)
            valid = valid & ok
            w = w * weights[i][..., t]
        for b in range(x.shape[0]):
            where: tuple[Any, ...] = (slice(None), *(ix[b] for ix in index))
            value = x[b][where]
            out[b] += value * (w[b] * valid[b])
    return out


def _border(i: T, size: int, padding: str, align: bool) -> tuple[T, T]:
    inside = (i >= 0) & (i < size)
    if padding == "zeros":
        return i.clamp(0, size - 1), inside
    if padding == "reflection":
        period = 2 * (size - 1) if align else 2 * size
        j = i % max(period, 1)
        i = torch.where(j >= size, period - j - (0 if align else 1), j)
    return i.clamp(0, size - 1), torch.ones_like(inside)


@op("AffineGrid", ulps=32)
def affine_grid(theta: T, size: T, *, align_corners: int = 0) -> T:
    return F.affine_grid(theta, [int(s) for s in size.tolist()], align_corners=bool(align_corners))


@op("RoiAlign", ulps=64)
def roi_align(
    x: T,
    rois: T,
    batch: T,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> T:
    offset = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    out = x.new_zeros(rois.shape[0], x.shape[1], output_height, output_width)
    for r in range(rois.shape[0]):
        x1, y1, x2, y2 = (float(v) * spatial_scale - offset for v in rois[r])
        width, height = x2 - x1, y2 - y1
        if not offset:
            width, height = max(width, 1.0), max(height, 1.0)
        bh, bw = height / output_height, width / output_width
        gh = sampling_ratio or max(1, math.ceil(bh))
        gw = sampling_ratio or max(1, math.ceil(bw))
        ys = y1 + (torch.arange(output_height * gh) + 0.5) * bh / gh
        xs = x1 + (torch.arange(output_width * gw) + 0.5) * bw / gw
        taps = _bilinear_taps(x[int(batch[r])], ys, xs)
        if mode == "avg":
            value = sum(taps[1:], taps[0])
            value = value.reshape(-1, output_height, gh, output_width, gw).mean((2, 4))
        else:
            value = torch.stack(taps).amax(0).reshape(-1, output_height, gh, output_width, gw).amax((2, 4))
        out[r] = value.to(x.dtype)
    return out


def _bilinear_taps(image: T, ys: T, xs: T) -> list[T]:
    """The four weighted neighbours of every (y, x); points more than one pixel outside give zero."""
    h, w = image.shape[1:]
    live = ((ys >= -1) & (ys <= h))[:, None] & ((xs >= -1) & (xs <= w))[None]
    ys, xs = ys.clamp(0, h - 1), xs.clamp(0, w - 1)
    y0, x0 = ys.floor().long(), xs.floor().long()
    y1, x1 = (y0 + 1).clamp(max=h - 1), (x0 + 1).clamp(max=w - 1)
    fy, fx = (ys - y0)[:, None].to(image.dtype), (xs - x0)[None].to(image.dtype)
    out = []
    for yi, wy in ((y0, 1 - fy), (y1, fy)):
        for xi, wx in ((x0, 1 - fx), (x1, fx)):
            out.append(image[:, yi][:, :, xi] * wy * wx * live)
    return out


@op("MaxRoiPool", ulps=0.0)
def max_roi_pool(x: T, rois: T, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> T:
    ph, pw = pooled_shape
    h, w = x.shape[2:]
    out = x.new_zeros(rois.shape[0], x.shape[1], ph, pw)
    for r, (b, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (math.floor(v * spatial_scale + 0.5) for v in box)
        bh, bw = max(y2 - y1 + 1, 1) / ph, max(x2 - x1 + 1, 1) / pw
        for i in range(ph):
            ya, yb = (min(max(v + y1, 0), h) for v in (math.floor(i * bh), math.ceil((i + 1) * bh)))
            for j in range(pw):
                xa, xb = (min(max(v + x1, 0), w) for v in (math.floor(j * bw), math.ceil((j + 1) * bw)))
                if yb > ya and xb > xa:
                    out[r, :, i, j] = x[int(b), :, ya:yb, xa:xb].amax((1, 2))
    return out
