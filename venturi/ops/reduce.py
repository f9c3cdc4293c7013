"""Reductions, arg-reductions, cumulative operators and TopK."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from venturi.ops.table import REDUCE, op

T = torch.Tensor


def _axes(x: T, axes: T | None, noop: int) -> list[int] | None:
    """None: nothing to reduce. ONNX: no axes means all of them, unless noop_with_empty_axes."""
    if axes is None or axes.numel() == 0:
        return None if noop else list(range(x.dim()))
    return sorted(int(a) % max(x.dim(), 1) for a in axes.tolist())


def _register(
    name: str,
    fn: Callable[[T, list[int], bool], T],
    *,
    before: Callable[[T], T] | None = None,
    ulps: float = 32.0,
) -> None:
    """`before` is the pointwise part, which still applies when there is nothing to reduce."""

    def reference(x: T, axes: T | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> T:
        dims = _axes(x, axes, noop_with_empty_axes)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else wide
        wide = before(wide) if before else wide
        if dims is None:
            after = torch.log if name == "ReduceLogSum" else torch.sqrt if name == "ReduceL2" else None
            out = after(wide) if after else wide
        elif not dims:
            out = fn(wide.reshape(1), [0], False)
        else:
            out = fn(wide, dims, bool(keepdims))
        return out.to(x.dtype)

    op(name, REDUCE, ulps=ulps)(reference)


def _prod(x: T, dims: list[int], keep: bool) -> T:
    for d in reversed(dims):
        x = x.prod(d, keepdim=keep)
    return x


def _extreme(fn: Callable[..., T], empty: Callable[[torch.dtype], float]) -> Callable[[T, list[int], bool], T]:
    def run(x: T, dims: list[int], keep: bool) -> T:
        if any(x.shape[d] == 0 for d in dims):
            shape = [1 if i in dims else s for i, s in enumerate(x.shape) if keep or i not in dims]
            return torch.full(shape, empty(x.dtype), dtype=x.dtype, device=x.device)
        if x.dtype == torch.bool:
            return fn(x.to(torch.uint8), dims, keep).to(torch.bool)
        return fn(x, dims, keep)

    return run


def _lowest(dtype: torch.dtype) -> float:
    return -np.inf if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return np.inf if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _mean(x: T, d: list[int], k: bool) -> T:
    return (
        x.mean(d, k)
        if x.dtype.is_floating_point
        else torch.div(x.sum(d, k), int(np.prod([x.shape[i] for i in d])), rounding_mode="trunc")
    )


def _log(x: T) -> T:
    return torch.log(x.double()) if not x.dtype.is_floating_point else torch.log(x)


_register("ReduceSum", lambda x, d, k: x.sum(d, k))
_register("ReduceMean", _mean)
_register("ReduceProd", _prod)
_register("ReduceMax", _extreme(torch.amax, _lowest), ulps=0.0)
_register("ReduceMin", _extreme(torch.amin, _highest), ulps=0.0)
_register("ReduceL1", lambda x, d, k: x.sum(d, k), before=torch.abs)
_register(
    "ReduceL2",
    lambda x, d, k: torch.sqrt(x.sum(d, k).double()) if not x.dtype.is_floating_point else torch.sqrt(x.sum(d, k)),
    before=torch.square,
)
_register("ReduceSumSquare", lambda x, d, k: x.sum(d, k), before=torch.square)
_register("ReduceLogSum", lambda x, d, k: _log(x.sum(d, k)))
_register(
    "ReduceLogSumExp",
    lambda x, d, k: torch.logsumexp(x if x.dtype.is_floating_point else x.double(), d, k),
)


def _arg(x: T, axis: int, keepdims: int, select_last: int, largest: bool) -> T:
    x = x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
    if select_last:
        x = x.flip(axis)
    index = x.argmax(axis, bool(keepdims)) if largest else x.argmin(axis, bool(keepdims))
    return x.shape[axis] - 1 - index if select_last else index


@op("ArgMax", REDUCE, ulps=0.0)
def arg_max(x: T, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> T:
    return _arg(x, axis, keepdims, select_last_index, True)


@op("ArgMin", REDUCE, ulps=0.0)
def arg_min(x: T, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> T:
    return _arg(x, axis, keepdims, select_last_index, False)


def _cumulative(fn: Callable[..., T], identity: int, x: T, axis: T, exclusive: int, reverse: int) -> T:
    dim = int(axis.reshape(())) % x.dim()
    y = x.flip(dim) if reverse else x
    out = fn(y, dim).to(x.dtype)
    if exclusive and x.shape[dim]:
        first = torch.full_like(out.narrow(dim, 0, 1), identity)
        out = torch.cat([first, out.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return out.flip(dim) if reverse else out


@op("CumSum", REDUCE, ulps=32)
def cum_sum(x: T, axis: T, *, exclusive: int = 0, reverse: int = 0) -> T:
    return _cumulative(torch.cumsum, 0, x, axis, exclusive, reverse)


@op("CumProd", REDUCE, ulps=32)
def cum_prod(x: T, axis: T, *, exclusive: int = 0, reverse: int = 0) -> T:
    return _cumulative(torch.cumprod, 1, x, axis, exclusive, reverse)


@op("TopK", REDUCE, ulps=0.0)
def top_k(x: T, k: T, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[T, T]:
    """Ties go to the lower index, as ONNX asks; hence a stable sort and not torch.topk."""
    keys = x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32) else x
    if x.dtype == torch.uint64:
        keys = x.view(torch.int64) ^ torch.iinfo(torch.int64).min
    index = torch.sort(keys, dim=axis, descending=bool(largest), stable=True).indices
    index = index.narrow(axis, 0, int(k.reshape(())))
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.gather(x.to(torch.int64), axis, index).to(x.dtype), index
    return torch.gather(x, axis, index), index
