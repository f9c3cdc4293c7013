"""A pointwise cluster as one pass over memory: every operand is loaded once, intermediate values stay in registers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from venturi.backends.cpu.codegen.axes import Axes
from venturi.backends.cpu.codegen.body import Body, emit_statement
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa

CHUNK = 4096


@dataclass(frozen=True)
class ElementwiseSpec:
    axes: Axes
    body: Body

    @property
    def rows_a_task(self) -> int:
        return max(1, CHUNK // self.axes.sizes[-1])

    @property
    def tasks(self) -> int:
        """Chunks of the only axis, or blocks of rows of the last one."""
        if self.axes.outer == 1:
            return -(-self.axes.sizes[-1] // CHUNK)
        return -(-self.axes.outer // self.rows_a_task)


def emit_elementwise(isa: Isa, spec: ElementwiseSpec) -> str:
    """Words: the operands' addresses, then the output's."""
    e = Emitter(isa)
    count, inner = spec.body.pointers, spec.axes.sizes[-1]
    pointers = [e.pointer(i) for i in range(count + 1)]

    def task(t: Val) -> None:
        if spec.axes.outer == 1:
            start = e.mul(t, CHUNK)
            _line(e, spec, pointers, start, e.min(e.add(start, CHUNK), inner))
            return
        first = e.mul(t, spec.rows_a_task)
        e.each(first, e.min(e.add(first, spec.rows_a_task), spec.axes.outer), 1, row)

    def row(r: Val) -> None:
        bases = row_bases(e, spec.axes, pointers[:count], r)
        _line(e, spec, [*bases, e.at(pointers[count], e.mul(r, inner))], 0, inner)

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def row_bases(e: Emitter, axes: Axes, pointers: list[Val], row: Val) -> list[Val]:
    """Where each operand's part of row `row` begins."""
    offsets: list[Val] = [0] * len(pointers)
    rest = row
    for a in reversed(range(len(axes.sizes) - 1)):
        rest, index = (0, rest) if a == 0 else e.divmod(rest, axes.sizes[a])
        for i, strides in enumerate(axes.strides):
            if strides[a]:
                offsets[i] = e.add(offsets[i], e.mul(index, strides[a]))
    return [e.at(p, o) for p, o in zip(pointers, offsets)]


def _line(e: Emitter, spec: ElementwiseSpec, pointers: list[Val], start: Val, stop: Val) -> None:
    """Elements [start, stop) of the last axis: whole vectors, then a masked rest."""
    lanes, inner = e.isa.lanes, spec.axes.sizes[-1]
    left = inner % lanes
    repeated = {
        i: e.splat(e.load_scalar(pointers[i])) for i, strides in enumerate(spec.axes.strides) if not strides[-1]
    }

    def vector(at: Val, count: int | None) -> None:
        values = [
            repeated[i] if i in repeated else e.load(e.at(pointers[i], at), count) for i in range(spec.body.pointers)
        ]
        for s in spec.body.statements:
            values.append(emit_statement(e, s, values))
        e.store(values[spec.body.result], e.at(pointers[-1], at), count)

    whole = inner - left
    e.each(start, e.min(stop, whole), lanes, lambda i: vector(i, None))
    if left:
        if isinstance(stop, int):
            vector(whole, left)
        else:
            e.when(e.b.icmp_signed("==", e.i64(stop), e.i64(inner)), partial(vector, whole, left))
