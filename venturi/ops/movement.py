"""Operators that move or reinterpret elements and compute none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from venturi.core.errors import ShapeError
from venturi.ops.table import VIEW, OpContext, op
from venturi.ops.tensors import STORAGE

T = torch.Tensor


def _ints(x: Any) -> list[int]:
    return [int(v) for v in x.reshape(-1).tolist()]


@op("Reshape", VIEW, ulps=0.0)
def reshape(x: Any, shape: T, *, allowzero: int = 0) -> Any:
    dims = _ints(shape)
    if not allowzero:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@op("Flatten", VIEW, ulps=0.0)
def flatten(x: Any, *, axis: int = 1) -> Any:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64)))


@op("Transpose", VIEW, ulps=0.0)
def transpose(x: Any, *, perm: list[int] | None = None) -> Any:
    order = list(range(x.ndim))[::-1] if perm is None else list(perm)
    return np.transpose(x, order) if isinstance(x, np.ndarray) else x.permute(order)


@op("Squeeze", VIEW, ulps=0.0)
def squeeze(x: Any, axes: T | None = None) -> Any:
    drop = {i for i, s in enumerate(x.shape) if s == 1} if axes is None else {a % x.ndim for a in _ints(axes)}
    for a in drop:
        if x.shape[a] != 1:
            raise ShapeError(f"Squeeze of axis {a} needs size 1, got shape {list(x.shape)}")
    return x.reshape([s for i, s in enumerate(x.shape) if i not in drop])


@op("Unsqueeze", VIEW, ulps=0.0)
def unsqueeze(x: Any, axes: T) -> Any:
    rank = x.ndim + axes.numel()
    new = {a % rank for a in _ints(axes)}
    old = iter(x.shape)
    return x.reshape([1 if i in new else next(old) for i in range(rank)])


@op("Expand", VIEW, ulps=0.0)
def expand(x: Any, shape: T) -> Any:
    target = np.broadcast_shapes(tuple(x.shape), tuple(_ints(shape)))
    return np.broadcast_to(x, target) if isinstance(x, np.ndarray) else x.expand(target)


@op("Concat", VIEW, ulps=0.0)
def concat(*xs: Any, axis: int) -> Any:
    if isinstance(xs[0], np.ndarray):
        return np.concatenate(xs, axis)
    return torch.cat(xs, axis)


@op("Split", VIEW, ulps=0.0)
def split(
    x: Any, split: T | None = None, *, axis: int = 0, num_outputs: int | None = None, ctx: OpContext
) -> tuple[Any, ...]:
    size = x.shape[axis]
    if split is not None:
        sizes = _ints(split)
    else:
        n = num_outputs or ctx.num_outputs
        chunk = -(-size // n)
        sizes = [max(0, min(chunk, size - i * chunk)) for i in range(n)]
    if sum(sizes) != size:
        raise ShapeError(f"Split of axis {axis} of size {size} into {sizes}")
    return tuple(torch.split(x, sizes, axis))


@op("Slice", VIEW, ulps=0.0)
def slice_(x: Any, starts: T, ends: T, axes: T | None = None, steps: T | None = None) -> Any:
    begin, end = _ints(starts), _ints(ends)
    dims = list(range(len(begin))) if axes is None else _ints(axes)
    stride = [1] * len(begin) if steps is None else _ints(steps)
    if isinstance(x, np.ndarray):
        index: list[slice] = [slice(None)] * x.ndim
        for b, e, d, s in zip(begin, end, dims, stride):
            index[d] = slice(b, None if s < 0 and e < -x.shape[d] else e, s)
        return x[tuple(index)]
    for b, e, d, s in zip(begin, end, dims, stride):
        d %= x.ndim
        size = x.shape[d]
        if s > 0:
            lo, hi, _ = slice(b, e, s).indices(size)
            x = x[(slice(None),) * d + (slice(lo, max(lo, hi), s),)]
        else:
            positions = range(*slice(b, None if e < -size else e, s).indices(size))
            x = x.index_select(d, torch.tensor(list(positions), dtype=torch.int64, device=x.device))
    return x


_PAD_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@op("Pad", VIEW, ulps=0.0)
def pad(x: T, pads: T, value: T | None = None, axes: T | None = None, *, mode: str = "constant") -> T:
    amounts = _ints(pads)
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in _ints(axes)]
    half = len(dims)
    before, after = [0] * x.dim(), [0] * x.dim()
    for i, d in enumerate(dims):
        before[d], after[d] = amounts[i], amounts[i + half]
    if mode == "constant":
        flat = [p for d in reversed(range(x.dim())) for p in (before[d], after[d])]
        fill = 0 if value is None else value.reshape(()).item()
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return F.pad(x.to(torch.int64), flat, value=fill).to(x.dtype)
        return F.pad(x, flat, value=fill)
    for d in range(x.dim()):
        if before[d] or after[d]:
            x = x.index_select(d, _pad_index(x.shape[d], before[d], after[d], mode).to(x.device))
    return x


def _pad_index(size: int, before: int, after: int, mode: str) -> T:
    """Source positions along one axis; negative amounts crop."""
    i = torch.arange(-before, size + after)
    if mode == "edge":
        return i.clamp(0, size - 1)
    if mode == "wrap":
        return i % size
    period = max(2 * (size - 1), 1)
    i = (i % period).abs()
    return torch.where(i >= size, period - i, i)


@op("CenterCropPad", VIEW, ulps=0.0)
def center_crop_pad(x: T, shape: T, *, axes: list[int] | None = None) -> T:
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    for d, want in zip(dims, _ints(shape)):
        have = x.shape[d]
        if have > want:
            x = x.narrow(d, (have - want) // 2, want)
        elif have < want:
            low = (want - have) // 2
            x = F.pad(x, [0, 0] * (x.dim() - 1 - d) + [low, want - have - low])
    return x


@op("Tile", VIEW, ulps=0.0)
def tile(x: Any, repeats: T) -> Any:
    return np.tile(x, _ints(repeats)) if isinstance(x, np.ndarray) else x.repeat(_ints(repeats))


@op("DepthToSpace", VIEW, ulps=0.0)
def depth_to_space(x: T, *, blocksize: int, mode: str = "DCR") -> T:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth", VIEW, ulps=0.0)
def space_to_depth(x: T, *, blocksize: int, mode: str = "DCR") -> T:
    n, c, h, w = x.shape
    b = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(*order).reshape(n, c * b * b, h // b, w // b)


@op("Trilu", VIEW, ulps=0.0)
def trilu(x: T, k: T | None = None, *, upper: int = 1) -> T:
    diagonal = 0 if k is None else int(k.reshape(()))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("ReverseSequence", VIEW, ulps=0.0)
def reverse_sequence(x: T, lengths: T, *, batch_axis: int = 1, time_axis: int = 0) -> T:
    y = x.movedim((batch_axis, time_axis), (0, 1))
    t = torch.arange(y.shape[1], device=x.device)[None]
    n = lengths[:, None].to(x.device)
    index = torch.where(t < n, n - 1 - t, t)
    index = index.reshape(*index.shape, *[1] * (y.dim() - 2)).expand(y.shape)
    return torch.gather(y, 1, index).movedim((0, 1), (batch_axis, time_axis))


@op("Shape", ulps=0.0)
def shape_(x: Any, *, start: int = 0, end: int | None = None) -> T:
    return torch.tensor(list(x.shape)[slice(start, end)], dtype=torch.int64)


@op("Size", ulps=0.0)
def size_(x: Any) -> T:
    return torch.tensor(int(np.prod(x.shape, dtype=np.int64)), dtype=torch.int64)


@op("Constant", ulps=0.0)
def constant(
    *,
    value: T | None = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
    value_string: str | None = None,
    value_strings: list[str] | None = None,
    sparse_value: T | None = None,
) -> Any:
    for tensor in (value, sparse_value):
        if tensor is not None:
            return tensor
    for floats in (value_float, value_floats):
        if floats is not None:
            return torch.tensor(floats, dtype=torch.float32)
    for ints in (value_int, value_ints):
        if ints is not None:
            return torch.tensor(ints, dtype=torch.int64)
    return np.array(value_string if value_string is not None else value_strings, dtype=object)


@op("ConstantOfShape", ulps=0.0)
def constant_of_shape(shape: T, *, value: T | None = None) -> T:
    if value is None:
        return torch.zeros(_ints(shape), dtype=torch.float32, device=shape.device)
    return value.reshape(()).to(shape.device).expand(_ints(shape)).clone()


@op("EyeLike", ulps=0.0)
def eye_like(x: T, *, dtype: int | None = None, k: int = 0) -> T:
    from venturi.ir.dtypes import DT

    out = torch.zeros(x.shape, dtype=STORAGE[DT(dtype)] if dtype else x.dtype, device=x.device)
    out.diagonal(k).fill_(1) if -x.shape[0] < k < x.shape[1] else None
    return out


@op("Range", ulps=1.0)
def range_(start: T, limit: T, delta: T, *, stash_type: int = 1) -> T:
    """ONNX: element i is start + i * delta; the count is ceil((limit - start) / delta)."""
    a, b, d = (v.reshape(()).item() for v in (start, limit, delta))
    count = max(0, int(np.ceil((b - a) / d)))
    wide = torch.float64 if start.dtype.is_floating_point else torch.int64
    return (torch.arange(count, dtype=wide, device=start.device) * d + a).to(start.dtype)
