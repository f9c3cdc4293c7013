"""Gather, scatter and the operators whose output shape depends on values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.core.errors import RequestError
from venturi.ops.table import DATA_DEPENDENT, op
from venturi.ops.tensors import to_numpy

T = torch.Tensor


def _wrap(index: T, size: int) -> T:
    """Negative indices count from the end; anything outside is an error, never a wild read."""
    index = index.to(torch.int64)
    if index.numel() and index.device.type == "cpu":
        low, high = int(index.min()), int(index.max())
        if low < -size or high >= size:
            raise RequestError(f"index {low if low < -size else high} is out of range for an axis of size {size}")
        if low >= 0:
            return index
    return torch.where(index < 0, index + size, index)


@op("Gather", ulps=0.0)
def gather(x: Any, index: T, *, axis: int = 0) -> Any:
    if isinstance(x, np.ndarray):
        return np.take(x, index.numpy(), axis)
    axis %= x.dim()
    picked = x.index_select(axis, _wrap(index, x.shape[axis]).reshape(-1))
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@op("GatherElements", ulps=0.0)
def gather_elements(x: T, index: T, *, axis: int = 0) -> T:
    return torch.gather(x, axis, _wrap(index, x.shape[axis]))


def _nd_index(index: T, shape: list[int]) -> tuple[T, ...]:
    return tuple(_wrap(index[..., i], s) for i, s in zip(range(index.shape[-1]), shape))


@op("GatherND", ulps=0.0)
def gather_nd(x: T, index: T, *, batch_dims: int = 0) -> T:
    if batch_dims == 0:
        return x[_nd_index(index, list(x.shape))]
    batch = x.shape[:batch_dims]
    flat_x = x.reshape(-1, *x.shape[batch_dims:])
    flat_i = index.reshape(flat_x.shape[0], *index.shape[batch_dims:])
    rows = [xi[_nd_index(ii, list(xi.shape))] for xi, ii in zip(flat_x, flat_i)]
    return torch.stack(rows).reshape(*batch, *rows[0].shape)


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", ulps=4.0)
def scatter_elements(x: T, index: T, updates: T, *, axis: int = 0, reduction: str = "none") -> T:
    index = _wrap(index, x.shape[axis])
    if reduction == "none":
        return x.clone().scatter_(axis, index, updates)
    return x.clone().scatter_reduce_(axis, index, updates, _SCATTER[reduction], include_self=True)


op("Scatter", ulps=0.0)(scatter_elements)


@op("ScatterND", ulps=4.0)
def scatter_nd(x: T, index: T, updates: T, *, reduction: str = "none") -> T:
    where = _nd_index(index, list(x.shape))
    out = x.clone()
    if reduction == "none":
        out[where] = updates
        return out
    if reduction == "add":
        return out.index_put_(where, updates, accumulate=True)
    k = index.shape[-1]
    strides = [int(np.prod(x.shape[i + 1 : k], dtype=np.int64)) for i in range(k)]
    row = sum((w * s for w, s in zip(where, strides)), torch.zeros_like(where[0])).reshape(-1)
    flat = out.reshape(int(np.prod(x.shape[:k], dtype=np.int64)), -1)
    source = updates.reshape(row.numel(), -1)
    flat = flat.scatter_reduce(0, row[:, None].expand_as(source), source, _SCATTER[reduction], include_self=True)
    return flat.reshape(x.shape)


@op("TensorScatter", ulps=0.0)
def tensor_scatter(cache: T, update: T, write: T | None = None, *, axis: int = -2, mode: str = "linear") -> T:
    axis %= cache.dim()
    length, size = update.shape[axis], cache.shape[axis]
    start = cache.new_zeros(cache.shape[0], dtype=torch.int64) if write is None else write.to(torch.int64)
    position = start[:, None] + torch.arange(length, device=cache.device)[None]
    position = position % size if mode == "circular" else position
    shape = [1] * cache.dim()
    shape[0], shape[axis] = cache.shape[0], length
    return cache.clone().scatter_(axis, _wrap(position, size).reshape(shape).expand(update.shape), update)


@op("OneHot", ulps=0.0)
def one_hot(index: T, depth: T, values: T, *, axis: int = -1) -> T:
    n = int(depth.reshape(-1)[0])
    index = index.to(torch.int64)
    index = torch.where(index < 0, index + n, index)
    axis = axis % (index.dim() + 1)
    positions = torch.arange(n, device=index.device).reshape([-1] + [1] * (index.dim() - axis))
    hit = index.unsqueeze(axis) == positions
    return torch.where(hit, values[1], values[0])


@op("NonZero", DATA_DEPENDENT, ulps=0.0)
def non_zero(x: T) -> T:
    return torch.nonzero(x).T.contiguous() if x.dim() else torch.nonzero(x.reshape(1)).T.contiguous()


@op("Compress", DATA_DEPENDENT, ulps=0.0)
def compress(x: T, condition: T, *, axis: int | None = None) -> T:
    x = x.reshape(-1) if axis is None else x
    return x.index_select(axis or 0, torch.nonzero(condition).reshape(-1))


@op("Unique", DATA_DEPENDENT, ulps=0.0)
def unique(x: T, *, axis: int | None = None, sorted: int = 1) -> tuple[T, T, T, T]:
    array = to_numpy(x if x.dtype != torch.bfloat16 else x.float())
    values, first, inverse, counts = np.unique(array, True, True, True, axis=axis)
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(first, kind="stable")
        values = np.take(values, order, axis or 0)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        first, counts, inverse = first[order], counts[order], rank[inverse]
    rest = [torch.from_numpy(np.ascontiguousarray(a)).to(torch.int64) for a in (first, inverse, counts)]
    return torch.from_numpy(np.ascontiguousarray(values)).to(x.dtype), rest[0], rest[1], rest[2]


@op("NonMaxSuppression", DATA_DEPENDENT, ulps=0.0)
def non_max_suppression(
    boxes: T,
    scores: T,
    max_output: T | None = None,
    iou_threshold: T | None = None,
    score_threshold: T | None = None,
    *,
    center_point_box: int = 0,
) -> T:
    limit = 0 if max_output is None else int(max_output.reshape(-1)[0])
    iou_limit = 0.0 if iou_threshold is None else float(iou_threshold.reshape(-1)[0])
    score_limit = None if score_threshold is None else float(score_threshold.reshape(-1)[0])
    if center_point_box:
        centre, size = boxes[..., :2], boxes[..., 2:]
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    low = torch.minimum(boxes[..., :2], boxes[..., 2:])
    high = torch.maximum(boxes[..., :2], boxes[..., 2:])
    area = (high - low).prod(-1)
    picked: list[list[int]] = []
    for b in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            for i in _nms(low[b], high[b], area[b], scores[b, c], limit, iou_limit, score_limit):
                picked.append([b, c, i])
    return torch.tensor(picked, dtype=torch.int64).reshape(-1, 3)


def _nms(low: T, high: T, area: T, score: T, limit: int, iou_limit: float, score_limit: float | None) -> list[int]:
    order = torch.sort(score, descending=True, stable=True).indices
    if score_limit is not None:
        order = order[score[order] > score_limit]
    keep: list[int] = []
    while order.numel() and len(keep) < limit:
        best, rest = order[0], order[1:]
        keep.append(int(best))
        overlap = (torch.minimum(high[rest], high[best]) - torch.maximum(low[rest], low[best])).clamp(min=0).prod(-1)
        union = area[rest] + area[best] - overlap
        order = rest[~(overlap > iou_limit * union)]
    return keep


@op("MaxUnpool", ulps=0.0)
def max_unpool(
    x: T,
    index: T,
    output_shape: T | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> T:
    n = len(kernel_shape)
    pads, strides = pads or [0] * 2 * n, strides or [1] * n
    natural = [
        (s - 1) * st - pads[i] - pads[i + n] + k for i, (s, st, k) in enumerate(zip(x.shape[2:], strides, kernel_shape))
    ]
    want = natural if output_shape is None else [int(v) for v in output_shape.tolist()][2:]
    flat = x.new_zeros(int(np.prod(x.shape[:2])) * int(np.prod(natural)))
    flat[index.reshape(-1)] = x.reshape(-1)
    out = flat.reshape(*x.shape[:2], *natural)
    extra = [p for w, h in zip(reversed(want), reversed(natural)) for p in (0, w - h)]
    return F.pad(out, extra)
