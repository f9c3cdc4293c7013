"""The iteration space of a pointwise kernel: output dimensions in memory order, merged where all inputs allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from venturi.backends.base import RegionView

T = torch.Tensor


@dataclass(frozen=True)
class Axis:
    """Merged neighbouring output dimensions (positions in the logical shape). `size` is None when not fixed."""

    dims: tuple[int, ...]
    size: int | None
    spans: tuple[bool, ...]


@dataclass(frozen=True)
class Space:
    """Axes from slowest to fastest. `spans[i]` of an axis says whether input i varies along it.

    `order` lists the logical dimensions as they lie in memory (NCHW shapes of an NHWC kernel: 0, 2, 3, 1).
    """

    axes: tuple[Axis, ...]
    order: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def channels_last(self) -> bool:
        return self.order == (0, 2, 3, 1)

    def is_flat(self, i: int) -> bool:
        """Whether input i has the output's own layout."""
        return all(axis.spans[i] for axis in self.axes)

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """Extent of every axis for an output of `shape`."""
        found = []
        for axis in self.axes:
            size = 1
            for d in axis.dims:
                size *= shape[d]
            found.append(size)
        return found

    def admits(self, shape: Sequence[int], inputs: Sequence[T]) -> bool:
        """Whether the inputs broadcast to `shape` the way the kernel was generated for."""
        full = len(shape)
        for i, x in enumerate(inputs):
            lead = full - x.dim()
            for axis in self.axes:
                for d in axis.dims:
                    size = x.shape[d - lead] if d >= lead else 1
                    if size != (shape[d] if axis.spans[i] else 1):
                        return False
        return all(axis.size is None or axis.size == n for axis, n in zip(self.axes, self.sizes(shape)))

    def dense(self, x: T) -> T:
        """`x` with its elements compact in the kernel's memory order and 16-byte aligned; copied only if needed."""
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = x.contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()

    def empty(self, shape: Sequence[int], like: T, dtype: torch.dtype) -> T:
        form = torch.channels_last if self.channels_last and len(shape) == 4 else torch.contiguous_format
        return torch.empty(list(shape), dtype=dtype, device=like.device, memory_format=form)


def space_of(region: RegionView, output: ir.Value, inputs: Sequence[ir.Value], tail: int = 0) -> Space | str:
    """The space of `output` read through `inputs`; the last `tail` logical dimensions are kept apart, as one axis.

    A text says why there is none: unknown ranks, or dimensions of which nobody knows whether they broadcast.
    """
    if output.shape is None or any(v.shape is None for v in inputs):
        return "a shape of unknown rank"
    rank = len(output.shape)
    nhwc = region.layout == "NHWC" and rank == 4
    order = (0, 2, 3, 1) if nhwc else tuple(range(rank))
    if nhwc and tail:
        return "a reduction over the last logical dimension of an NHWC value"
    spans = []
    for value in inputs:
        found = _spans(value, output)
        if found is None:
            return f"whether {value.name!r} broadcasts is only known at run time"
        spans.append(found)
    axes: list[Axis] = []
    for at, d in enumerate(order):
        size = output.shape[d]
        last = at >= rank - tail
        if size == 1 and not last:
            continue
        mine = tuple(s[d] for s in spans)
        joins = axes and axes[-1].spans == mine and (last == (axes[-1].dims[-1] in order[rank - tail :]) or not tail)
        if joins:
            before = axes.pop()
            merged = before.size * size if isinstance(size, int) and before.size is not None else None
            axes.append(Axis((*before.dims, d), merged, mine))
        else:
            axes.append(Axis((d,), size if isinstance(size, int) else None, mine))
    return Space(tuple(axes), order, tuple(len(v.shape) for v in inputs if v.shape is not None))


def _spans(value: ir.Value, output: ir.Value) -> list[bool] | None:
    """Along which output dimensions `value` varies; None when unknown."""
    assert value.shape is not None
    assert output.shape is not None
    lead = len(output.shape) - len(value.shape)
    if lead < 0:
        return None
    found = [False] * lead
    for own, out in zip(value.shape, list(output.shape)[lead:]):
        if own == 1:
            found.append(False)
        elif own == out and (isinstance(own, int) or own.value is not None):
            found.append(True)
        else:
            return None
    return found
