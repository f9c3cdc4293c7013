"""Numbers to bytes whose scale and zero are those of what is there: ONNX's DynamicQuantizeLinear as two loops.

The first finds the range of each of PARTS pieces, the second joins these and rounds. Scratch memory holds, in order:
scale and zero (fp32), the least and the greatest number of every piece (a vector each), the bytes.
"""

from __future__ import annotations

from functools import partial

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.element import U8, Place
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.rows import across

PARTS, CHUNK = 16, 4096
_NUMBERS, _LINE = 16, 16
HEADER = 4 * (_NUMBERS + 2 * PARTS * _LINE)
LIMITS = (0, 255)


def tasks(count: int) -> int:
    """Of the second loop."""
    return -(-count // CHUNK)


def emit_range(isa: Isa) -> str:
    """Words: numbers, scratch, how many. Always PARTS tasks."""
    e = Emitter(isa)
    x, scratch, count = e.pointer(0), e.pointer(1), e.word(2)
    size = e.mul(e.divmod(e.add(count, PARTS * isa.lanes - 1), PARTS * isa.lanes)[0], isa.lanes)

    def task(part: Val) -> None:
        first = e.min(e.mul(part, size), count)
        last = e.min(e.add(first, size), count)
        whole = e.sub(last, e.divmod(e.sub(last, first), isa.lanes)[1])

        def joined(known: list[Val], value: Val) -> list[Val]:
            return [m.minimum(e, known[0], value), m.maximum(e, known[1], value)]

        known = e.loop(first, whole, isa.lanes, [e.constant(0.0)] * 2, lambda i, k: joined(k, e.load(e.at(x, i))))
        left = e.sub(last, whole)
        known = e.loop(whole, last, isa.lanes, known, lambda i, k: joined(k, e.load(e.at(x, i), left)))
        for i, value in enumerate(known):
            e.store(value, _piece(e, scratch, part, i))

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def emit_bytes(isa: Isa) -> str:
    """Words: numbers, scratch, how many."""
    e = Emitter(isa)
    x, scratch, count = e.pointer(0), e.pointer(1), e.word(2)
    out = bytes_of(e, scratch)
    ends = []
    for i, join in enumerate((m.minimum, m.maximum)):
        known = e.load(_piece(e, scratch, 0, i))
        for part in range(1, PARTS):
            known = join(e, known, e.load(_piece(e, scratch, part, i)))
        ends.append(across(e, known, partial(join, e)))
    low, high = ends
    scale = e.b.fdiv(e.b.fsub(high, low), e.constant(255.0))
    safe = e.b.select(e.b.fcmp_ordered("==", scale, e.constant(0.0)), e.constant(1.0), scale)
    zero = m.quantize(e, e.b.fdiv(e.b.fsub(e.constant(0.0), low), safe), e.constant(0.0), LIMITS)
    zero = e.b.select(e.b.fcmp_ordered("ord", zero, zero), zero, e.constant(0.0))
    # an infinite range makes every result NaN, as it does by the definition
    spoilt = e.b.fadd(scale, e.b.fsub(scale, scale))

    def task(t: Val) -> None:
        first = e.mul(t, CHUNK)
        last = e.min(e.add(first, CHUNK), count)
        whole = e.sub(last, e.divmod(e.sub(last, first), isa.lanes)[1])
        left = e.sub(last, whole)

        def some(i: Val, n: Val | None) -> None:
            value = e.b.fdiv(e.load(e.at(x, i), n), safe)
            e.store(m.quantize(e, value, zero, LIMITS), e.at(out, i), n)

        e.each(first, whole, isa.lanes, lambda i: some(i, None))
        e.each(whole, last, isa.lanes, lambda i: some(i, left))

    def header() -> None:
        e.store(spoilt, scratch, 1)
        e.store(zero, e.at(scratch, 1), 1)

    e.when(e.b.icmp_signed("==", e.begin, e.i64(0)), header)
    e.each(e.begin, e.end, 1, task)
    return e.finish()


def numbers_of(e: Emitter, scratch: Place) -> tuple[Val, Val]:
    """Scale and zero, in all lanes."""
    return e.splat(e.load_scalar(scratch)), e.splat(e.load_scalar(e.at(scratch, 1)))


def bytes_of(e: Emitter, scratch: Place) -> Place:
    return Place(e.at(scratch, HEADER // 4).address, U8)


def _piece(e: Emitter, scratch: Place, part: Val, end: int) -> Place:
    return e.at(scratch, e.add(e.mul(part, 2 * _LINE), _NUMBERS + end * _LINE))
