"""A pointwise cluster as one pass over memory: every operand is loaded once, intermediate values stay in registers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from venturi.backends.cpu.codegen.axes import Axes
from venturi.backends.cpu.codegen.body import Body, emit_statement
from venturi.backends.cpu.codegen.element import Place
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa

CHUNK = 4096


@dataclass(frozen=True)
class ElementwiseSpec:
    """`axes` are of any length: the slowest axis's size is given when the code runs."""

    axes: Axes
    body: Body

    @property
    def is_flat(self) -> bool:
        return len(self.axes.sizes) == 1

    @property
    def rows_a_task(self) -> int:
        return max(1, CHUNK // self.axes.sizes[-1])

    def tasks(self, length: int) -> int:
        """Chunks of the only axis, or blocks of rows of the last one, where the slowest axis has size `length`."""
        if self.is_flat:
            return -(-length // CHUNK)
        return -(-length * math.prod(self.axes.sizes[1:-1]) // self.rows_a_task)


def emit_elementwise(isa: Isa, spec: ElementwiseSpec) -> str:
    """Words: the operands' addresses, the output's, the size of the slowest axis."""
    e = Emitter(isa)
    count, inner = spec.body.pointers, spec.axes.sizes[-1]
    pointers = spec.body.places(e)
    length = e.word(count + 1)
    rows = e.mul(length, math.prod(spec.axes.sizes[1:-1]))

    def task(t: Val) -> None:
        if spec.is_flat:
            start = e.mul(t, CHUNK)
            _line(e, spec, pointers, start, e.min(e.add(start, CHUNK), length))
            return
        first = e.mul(t, spec.rows_a_task)
        e.each(first, e.min(e.add(first, spec.rows_a_task), rows), 1, row)

    def row(r: Val) -> None:
        bases = row_bases(e, spec.axes, pointers[:count], r)
        _line(e, spec, [*bases, e.at(pointers[count], e.mul(r, inner))], 0, inner)

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def row_bases(e: Emitter, axes: Axes, pointers: list[Place], row: Val) -> list[Place]:
    """Where each operand's part of row `row` begins."""
    offsets: list[Val] = [0] * len(pointers)
    rest = row
    for a in reversed(range(len(axes.sizes) - 1)):
        rest, index = (0, rest) if a == 0 else e.divmod(rest, axes.sizes[a])
        for i, strides in enumerate(axes.strides):
            if strides[a]:
                offsets[i] = e.add(offsets[i], e.mul(index, strides[a]))
    return [e.at(p, o) for p, o in zip(pointers, offsets)]


def _line(e: Emitter, spec: ElementwiseSpec, pointers: list[Place], start: Val, stop: Val) -> None:
    """Elements [start, stop) of the last axis, `start` at a whole vector: whole vectors, then a masked rest."""
    lanes = e.isa.lanes
    repeated = {
        i: e.splat(e.load_scalar(pointers[i])) for i, strides in enumerate(spec.axes.strides) if not strides[-1]
    }

    def vector(at: Val, count: Val | None) -> None:
        values = [
            repeated[i] if i in repeated else e.load(e.at(pointers[i], at), count) for i in range(spec.body.pointers)
        ]
        for s in spec.body.statements:
            values.append(emit_statement(e, s, values))
        e.store(values[spec.body.result], e.at(pointers[-1], at), count)

    if isinstance(stop, int):
        whole = stop - stop % lanes
        e.each(start, whole, lanes, lambda i: vector(i, None))
        if whole < stop:
            vector(whole, stop - whole)
        return
    whole = e.sub(stop, e.divmod(stop, lanes)[1])
    e.each(start, whole, lanes, lambda i: vector(i, None))
    e.when(e.b.icmp_signed("<", whole, stop), lambda: vector(whole, e.sub(stop, whole)))
