"""A cluster around a reduction over the last axis: each row is computed once into stack memory and finished there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.axes import Axes
from venturi.backends.cpu.codegen.body import Body, Statement, emit_statement
from venturi.backends.cpu.codegen.element import Place
from venturi.backends.cpu.codegen.elementwise import row_bases
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa

ROW_OPS = ("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization")
MAX_COLUMNS = 32768
CHUNK = 4096


@dataclass(frozen=True)
class RowSpec:
    """`anchor` is the number of the reducing statement among the body's. `axes` are two at least and of any length: the
    slowest one's size is given when the code runs."""

    axes: Axes
    body: Body
    anchor: int

    @property
    def rows_a_task(self) -> int:
        return max(1, CHUNK // self.axes.sizes[-1])

    def tasks(self, length: int) -> int:
        """Blocks of rows where the slowest axis has size `length`."""
        return -(-length * math.prod(self.axes.sizes[1:-1]) // self.rows_a_task)


def emit_rows(isa: Isa, spec: RowSpec) -> str:
    """Words: the operands' addresses, the output's, the size of the slowest axis."""
    e = Emitter(isa)
    kernel = _Rows(e, spec)
    rows = e.mul(e.word(spec.body.pointers + 1), math.prod(spec.axes.sizes[1:-1]))

    def task(t: Val) -> None:
        first = e.mul(t, spec.rows_a_task)
        e.each(first, e.min(e.add(first, spec.rows_a_task), rows), 1, kernel.row)

    e.each(e.begin, e.end, 1, task)
    return e.finish()


class _Rows:
    def __init__(self, e: Emitter, spec: RowSpec) -> None:
        self.e, self.spec, self.n = e, spec, spec.axes.sizes[-1]
        self.pointers = spec.body.places(e)
        self.buffer = e.stack(-(-self.n // e.isa.lanes) * e.isa.lanes)

    def row(self, r: Val) -> None:
        e, body = self.e, self.spec.body
        bases = row_bases(e, self.spec.axes, self.pointers[:-1], r)
        out = e.at(self.pointers[-1], e.mul(r, self.n))
        node = body.statements[self.spec.anchor]
        before, after = body.statements[: self.spec.anchor], body.statements[self.spec.anchor + 1 :]
        values = partial(self._values, bases, before)
        finish = _FINISH[node.op](self, node, values)

        def last(at: Val, count: int | None) -> None:
            known = values(at, count)
            known.append(finish(at, count, known))
            for s in after:
                known.append(emit_statement(e, s, known))
            e.store(known[body.result], e.at(out, at), count)

        self.sweep(last)

    def _values(self, bases: list[Place], statements: Sequence[Statement], at: Val, count: int | None) -> list[Val]:
        """All values before the anchor. What nobody reads LLVM drops."""
        e = self.e
        found = [
            e.load(e.at(p, at), count) if strides[-1] else e.splat(e.load_scalar(p))
            for p, strides in zip(bases, self.spec.axes.strides)
        ]
        for s in statements:
            found.append(emit_statement(e, s, found))
        return found

    def sweep(self, body: Callable[[Val, int | None], None]) -> None:
        """`body(position, lanes in use)` over the row."""
        lanes = self.e.isa.lanes
        whole = self.n - self.n % lanes
        self.e.each(0, whole, lanes, lambda i: body(i, None))
        if whole < self.n:
            body(whole, self.n - whole)

    def fold(self, start: float, step: Callable[[Val, Val, int | None], Val]) -> Val:
        """`accumulator = step(accumulator, position, lanes in use)` over the row: a vector of partial results."""
        e, lanes = self.e, self.e.isa.lanes
        whole = self.n - self.n % lanes
        acc = e.loop(0, whole, lanes, [e.constant(start)], lambda i, a: [step(a[0], i, None)])[0]
        return step(acc, whole, self.n - whole) if whole < self.n else acc

    def keep(self, value: Val, at: Val) -> None:
        self.e.store(value, self.e.at(self.buffer, at))

    def kept(self, at: Val) -> Val:
        return self.e.load(self.e.at(self.buffer, at))

    def among(self, value: Val, count: int | None, other: float) -> Val:
        """`value` in the lanes in use, `other` beyond."""
        e = self.e
        return value if count is None else e.b.select(e.mask(count), value, e.constant(other))


def _total(e: Emitter, vector: Val) -> Val:
    """The sum of the lanes, in all lanes: halves are added until one is left."""
    return across(e, vector, lambda x, y: e.b.fadd(x, y))


def across(e: Emitter, vector: Val, op: Callable[[Val, Val], Val]) -> Val:
    """The lanes joined by `op`, in all lanes."""
    step = e.isa.lanes // 2
    while step:
        vector = op(vector, e.rotate(vector, step))
        step //= 2
    return vector


Values = Callable[[Val, int | None], list[Val]]
Finish = Callable[[Val, int | None, list[Val]], Val]


def _softmax(k: _Rows, node: Statement, values: Values) -> Finish:
    e, source = k.e, node.inputs[0]

    def larger(acc: Val, at: Val, count: int | None) -> Val:
        x = values(at, count)[source]
        k.keep(x, at)
        return m.maximum(e, acc, k.among(x, count, -float("inf")))

    top = across(e, k.fold(-float("inf"), larger), lambda x, y: m.maximum(e, x, y))

    def add(acc: Val, at: Val, count: int | None) -> Val:
        shifted = e.b.fsub(k.kept(at), top)
        power = m.exp(e, shifted)
        k.keep(power if node.op == "Softmax" else shifted, at)
        return e.b.fadd(acc, k.among(power, count, 0.0))

    total = _total(e, k.fold(0.0, add))
    if node.op == "Softmax":
        scale = e.b.fdiv(e.constant(1.0), total)
        return lambda at, count, known: e.b.fmul(k.kept(at), scale)
    log = m.log(e, total)
    return lambda at, count, known: e.b.fsub(k.kept(at), log)


def _layer_norm(k: _Rows, node: Statement, values: Values) -> Finish:
    e, source = k.e, node.inputs[0]

    def add(acc: Val, at: Val, count: int | None) -> Val:
        x = values(at, count)[source]
        k.keep(x, at)
        return e.b.fadd(acc, k.among(x, count, 0.0))

    mean = e.b.fmul(_total(e, k.fold(0.0, add)), e.constant(1.0 / k.n))

    def square(acc: Val, at: Val, count: int | None) -> Val:
        centered = e.b.fsub(k.kept(at), mean)
        k.keep(centered, at)
        centered = k.among(centered, count, 0.0)
        return e.fma(centered, centered, acc)

    return _normed(k, node, _total(e, k.fold(0.0, square)))


def _rms_norm(k: _Rows, node: Statement, values: Values) -> Finish:
    e, source = k.e, node.inputs[0]

    def square(acc: Val, at: Val, count: int | None) -> Val:
        x = values(at, count)[source]
        k.keep(x, at)
        x = k.among(x, count, 0.0)
        return e.fma(x, x, acc)

    return _normed(k, node, _total(e, k.fold(0.0, square)))


def _normed(k: _Rows, node: Statement, squares: Val) -> Finish:
    """kept / sqrt(squares / n + epsilon) * scale + bias."""
    e = k.e
    epsilon = float(dict(node.attrs).get("epsilon", 1e-5))
    variance = e.fma(squares, e.constant(1.0 / k.n), e.constant(epsilon))
    factor = e.b.fdiv(e.constant(1.0), e.b.call(e.math("sqrt", 1), [variance]))

    def finish(at: Val, count: int | None, known: list[Val]) -> Val:
        x = e.b.fmul(k.kept(at), factor)
        x = e.b.fmul(x, known[node.inputs[1]])
        return e.b.fadd(x, known[node.inputs[2]]) if len(node.inputs) > 2 and node.inputs[2] >= 0 else x

    return finish


_FINISH = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
}
