"""Pointwise clusters, softmax and norms by generated code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from venturi.backends.base import OUT, Config, Kernel, Operand, Phase, RegionView, Routine
from venturi.backends.cpu.codegen.axes import Axes, axes_of
from venturi.backends.cpu.codegen.body import Reading, read_body
from venturi.backends.cpu.codegen.elementwise import ElementwiseSpec, emit_elementwise
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.codegen.rows import MAX_COLUMNS, ROW_OPS, RowSpec, emit_rows
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.tactics.reference import Reference
from venturi.ir.build import get_attr

T = torch.Tensor
NHWC = (0, 2, 3, 1)
NOT_LEADING = "a size that code would depend on is only known at run time"


def free_dims_lead(region: RegionView) -> bool:
    """Whether the output's sizes are known but for the slowest ones in memory: one kernel then serves all of them."""
    shape = region.outputs[0].shape
    if shape is None:
        return False
    known = [isinstance(d, int) for d in shape]
    if region.layout == "NHWC" and len(known) == 4:
        return all(known[1:])
    first = next((i for i, k in enumerate(known) if k), len(known))
    return all(known[first:])


class _Operands:
    """Pointer operands in the kernel's order: positions among the dynamic inputs, or constants in memory order."""

    def __init__(self, region: RegionView, reading: Reading) -> None:
        self.nhwc = region.layout == "NHWC" and len(region.outputs[0].shape or ()) == 4
        self._places: list[int | T] = []
        for value in reading.pointers:
            weight, position = region.constant(value), region.position(value)
            if weight is None:
                assert position is not None
                self._places.append(position)
            else:
                self._places.append(weight.contiguous(memory_format=self.layout(weight.dim())))

    def layout(self, rank: int) -> torch.memory_format:
        return torch.channels_last if self.nhwc and rank == 4 else torch.contiguous_format

    def shapes(self, given: Shapes) -> list[tuple[int, ...]]:
        return [given[p] if isinstance(p, int) else tuple(p.shape) for p in self._places]

    def words(self) -> list[int | Operand]:
        return [Operand(p) if isinstance(p, int) else p.data_ptr() for p in self._places]

    def fit(self, given: Shapes) -> bool:
        """In NHWC order an operand of fewer than 4 dimensions must repeat over all but the last of them, or be one
        channel vector shaped [C, 1, 1]: only then does it lie in memory as the kernel reads it."""
        return not self.nhwc or all(len(s) == 4 or sum(n != 1 for n in s) <= 1 for s in self.shapes(given))


def _kernel(
    isa: Isa,
    region: RegionView,
    reading: Reading,
    keep: int,
    make: Callable[[Any], tuple[Any, Callable[[], str]] | None],
) -> Kernel:
    operands = _Operands(region, reading)

    def plan(given: Shapes) -> Routine | None:
        shapes = operands.shapes(given)
        try:
            shape = tuple(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            return None
        if 0 in shape or not operands.fit(given) or (operands.nhwc and len(shape) != 4):
            return None
        order = NHWC if operands.nhwc else tuple(range(len(shape)))
        axes = axes_of(shape, shapes, order, keep)
        if axes is None or (made := make(axes)) is None:
            return None
        spec, emit = made
        length = axes.sizes[0] if len(axes.sizes) == len(spec.axes.sizes) else 1
        address = host_jit(isa).address(repr(spec), emit)
        phase = Phase(address, (*operands.words(), OUT, length), spec.tasks(length))
        layouts = tuple(operands.layout(len(s)) for s in given)
        return Routine((phase,), shape, operands.layout(len(shape)), layouts, dtype=reading.body.out.dtype)

    other = Reference().bind(region, {}).run
    return NativeKernel(plan, other, keep=operands).as_kernel()


class NativePointwise:
    """One pass over memory for all operators of the cluster."""

    name = "native-pointwise"

    def match(self, region: RegionView) -> list[Config] | str:
        isa = host()
        if isinstance(isa, str):
            return isa
        if any(n.op_type in ROW_OPS for n in region.nodes):
            return "has a reduction"
        reading = read_body(region)
        if isinstance(reading, str):
            return reading
        if not free_dims_lead(region):
            return NOT_LEADING
        return [{}] if any(region.constant(v) is None for v in reading.pointers) else "no computed input"

    def bind(self, region: RegionView, config: Config) -> Kernel:
        isa, reading = host(), read_body(region)
        assert isinstance(isa, Isa)
        assert isinstance(reading, Reading)

        def make(axes: Any) -> tuple[ElementwiseSpec, Callable[[], str]]:
            spec = ElementwiseSpec(axes.any_length(), reading.body)
            return spec, lambda: emit_elementwise(isa, spec)

        return _kernel(isa, region, reading, 0, make)


class NativeRows:
    """Softmax and norms with the pointwise operators around them; a row never leaves the first cache."""

    name = "native-rows"

    def match(self, region: RegionView) -> list[Config] | str:
        isa = host()
        if isinstance(isa, str):
            return isa
        found = self._read(region)
        return found if isinstance(found, str) else [{}]

    def _read(self, region: RegionView) -> tuple[Reading, int, int] | str:
        """(statements, number of the reducing one, dimensions it reduces)."""
        anchors = [n for n in region.nodes if n.op_type in ROW_OPS and not n.domain]
        if len(anchors) != 1:
            return f"{len(anchors)} row reductions"
        anchor = anchors[0]
        source, output = anchor.inputs[0], region.outputs[0]
        if source is None or source.shape is None or output.shape is None or list(source.shape) != list(output.shape):
            return "the reduced value has another shape than the output, or none is known"
        if any(v.uses() or v.is_graph_output() for v in anchor.outputs[1:]):
            return "more than the normalized output is read"
        rank = len(source.shape)
        if rank == 0 or (region.layout == "NHWC" and rank == 4):
            return "not over the last dimension in memory"
        axis = int(get_attr(anchor, "axis", -1)) % rank
        if "Softmax" in anchor.op_type and axis != rank - 1:
            return "not along the last dimension"
        reading = read_body(region, anchor)
        if isinstance(reading, str):
            return reading
        if not free_dims_lead(region):
            return NOT_LEADING
        if all(region.constant(v) is not None for v in reading.pointers):
            return "no computed input"
        at = next(i for i, s in enumerate(reading.body.statements) if s.op in ROW_OPS)
        return reading, at, rank - axis

    def bind(self, region: RegionView, config: Config) -> Kernel:
        isa, found = host(), self._read(region)
        assert isinstance(isa, Isa)
        assert not isinstance(found, str)
        reading, anchor, reduced = found

        def make(axes: Any) -> tuple[RowSpec, Callable[[], str]] | None:
            if axes.sizes[-1] > MAX_COLUMNS:
                return None
            if len(axes.sizes) == 1:
                axes = Axes((1, *axes.sizes), tuple((0, *s) for s in axes.strides))
            spec = RowSpec(axes.any_length(), reading.body, anchor)
            return spec, lambda: emit_rows(isa, spec)

        return _kernel(isa, region, reading, reduced, make)
