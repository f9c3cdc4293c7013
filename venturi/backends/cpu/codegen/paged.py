"""Attention of new tokens over a paged cache, in two loops: rotate and write to the cache, then attend.

A token and some heads that share keys are a task. Keys go by in chunks; the largest score and the sum of powers so far
are kept, and what was summed before a larger score came is scaled down (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018). A result depends on nothing but its own sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.element import Element, Place
from venturi.backends.cpu.codegen.emit import I32, I64, Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.rows import across

CHUNK = 64
MOST_HEADS, REGISTERS = 8, 24
_INFINITY = float("inf")


@dataclass(frozen=True)
class PagedSpec:
    """Caches are [blocks, block_tokens, kv_heads, dim or v_dim]. The first 2 * `pairs` features of a head are rotated,
    i together with i + pairs. `window`: keys that a token sees, itself included."""

    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    pairs: int
    block_tokens: int
    element: Element
    cache: Element
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def together(self) -> int:
        """Heads of a task."""
        group = self.heads // self.kv_heads
        return max(n for n in range(1, MOST_HEADS + 1) if group % n == 0)

    @property
    def parts(self) -> int:
        """Tasks of a token."""
        return self.heads // self.together

    def fits(self, isa: Isa) -> bool:
        """Whether heads and their rotated parts are whole vectors."""
        return not any(n % isa.lanes for n in (self.dim, self.v_dim, self.pairs)) and self.heads % self.kv_heads == 0


def emit_rotate(isa: Isa, spec: PagedSpec) -> str:
    """Words: queries, keys, values, how far apart each one's tokens are, angles, positions, slots, both caches, and the
    rotated and scaled queries in fp32. A token is a task."""
    e = Emitter(isa)
    given = [e.pointer(i, spec.element) for i in range(3)]
    apart = [e.word(i) for i in range(3, 6)]
    angles, positions, slots = (e.pointer(i) for i in range(6, 9))
    k_cache, v_cache, home = e.pointer(9, spec.cache), e.pointer(10, spec.cache), e.pointer(11)

    def task(t: Val) -> None:
        slot, q, k, v = _word(e, slots, t), *(e.at(x, e.mul(t, row)) for x, row in zip(given, apart))
        turn = e.at(angles, e.mul(_word(e, positions, t), 2 * spec.pairs))
        q_home = e.at(home, e.mul(t, spec.heads * spec.dim))
        k_home = e.at(k_cache, e.mul(slot, spec.kv_heads * spec.dim))
        e.each(0, spec.heads, 1, lambda h: _rotate(e, spec, q, q_home, turn, e.mul(h, spec.dim), spec.scale))
        e.each(0, spec.kv_heads, 1, lambda h: _rotate(e, spec, k, k_home, turn, e.mul(h, spec.dim), 1.0))
        v_home = e.at(v_cache, e.mul(slot, spec.kv_heads * spec.v_dim))
        e.each(0, spec.kv_heads * spec.v_dim, isa.lanes, lambda i: e.store(e.load(e.at(v, i)), e.at(v_home, i)))

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def _word(e: Emitter, place: Place, index: Val) -> Val:
    """Number `index` of 64-bit integers."""
    return e.load_word(e.at(place, e.mul(index, 2)))


def _rotate(e: Emitter, spec: PagedSpec, source: Place, home: Place, turn: Place, at: Val, scale: float) -> None:
    x, y, factor = e.at(source, at), e.at(home, at), e.constant(scale)

    def pair(i: Val) -> None:
        a, b = e.load(e.at(x, i)), e.load(e.at(x, e.add(i, spec.pairs)))
        cos, sin = e.load(e.at(turn, i)), e.load(e.at(turn, e.add(i, spec.pairs)))
        low = e.b.fsub(e.b.fmul(a, cos), e.b.fmul(b, sin))
        high = e.fma(a, sin, e.b.fmul(b, cos))
        e.store(e.b.fmul(low, factor), e.at(y, i))
        e.store(e.b.fmul(high, factor), e.at(y, e.add(i, spec.pairs)))

    e.each(0, spec.pairs, e.isa.lanes, pair)
    e.each(2 * spec.pairs, spec.dim, e.isa.lanes, lambda i: e.store(e.b.fmul(e.load(e.at(x, i)), factor), e.at(y, i)))


def emit_attend(isa: Isa, spec: PagedSpec) -> str:
    """Words: queries as `emit_rotate` leaves them, both caches, block tables (32 bits) and their width, every token's
    table and position, out, sinks. A token has `parts` tasks."""
    e = Emitter(isa)
    _Attend(e, spec).tasks()
    return e.finish()


class _Attend:
    def __init__(self, e: Emitter, spec: PagedSpec) -> None:
        self.e, self.spec, self.n = e, spec, spec.together
        self.q, self.k, self.v = e.pointer(0), e.pointer(1, spec.cache), e.pointer(2, spec.cache)
        self.tables, self.width, self.rows, self.positions = e.pointer(3), e.word(4), e.pointer(5), e.pointer(6)
        self.out, self.sinks = e.pointer(7, spec.element), e.pointer(8)
        lanes = e.isa.lanes
        self.slots = e.stack(2 * CHUNK)
        self.scores, self.sums = e.stack(self.n * CHUNK), e.stack(self.n * spec.v_dim)
        self.tops, self.totals = e.stack(self.n * lanes), e.stack(self.n * lanes)

    def tasks(self) -> None:
        e, spec = self.e, self.spec

        def task(t: Val) -> None:
            token, part = e.divmod(t, spec.parts)
            head = e.mul(part, self.n)
            kv_head = e.divmod(head, spec.heads // spec.kv_heads)[0]
            self._begin(head)
            last = e.add(_word(e, self.positions, token), 1)
            first = 0 if spec.window is None else e.max(e.sub(last, spec.window), 0)
            table = e.at(self.tables, e.mul(_word(e, self.rows, token), self.width))
            q = e.at(self.q, e.add(e.mul(token, spec.heads * spec.dim), e.mul(head, spec.dim)))
            e.each(first, last, CHUNK, lambda c: self._chunk(q, table, kv_head, c, e.min(e.sub(last, c), CHUNK)))
            self._finish(e.at(self.out, e.mul(e.add(e.mul(token, spec.heads), head), spec.v_dim)))

        e.each(e.begin, e.end, 1, task)

    def _begin(self, head: Val) -> None:
        e, lanes = self.e, self.e.isa.lanes
        for i in range(self.n):
            sink = self.spec.sinks
            top = e.splat(e.load_scalar(e.at(self.sinks, e.add(head, i)))) if sink else e.constant(-_INFINITY)
            e.store(top, e.at(self.tops, i * lanes))
            e.store(e.constant(float(sink)), e.at(self.totals, i * lanes))
        e.each(0, self.n * self.spec.v_dim, lanes, lambda i: e.store(e.constant(0.0), e.at(self.sums, i)))

    def _chunk(self, q: Place, table: Place, kv_head: Val, start: Val, count: Val) -> None:
        e, spec = self.e, self.spec

        def locate(j: Val) -> None:
            block, place = e.divmod(e.add(start, j), spec.block_tokens)
            entry = e.b.sext(e.b.load(e.at(table, block).address, typ=I32, align=4), I64)
            slot = e.add(e.mul(entry, spec.block_tokens), place)
            row = e.add(e.mul(slot, spec.kv_heads), kv_head)
            e.b.store(row, e.at(self.slots, e.mul(j, 2)).address, align=8)

        e.each(0, count, 1, locate)
        e.each(0, self.n * CHUNK, e.isa.lanes, lambda i: e.store(e.constant(-_INFINITY), e.at(self.scores, i)))
        e.each(0, count, 1, partial(self._score, q))
        for i in range(self.n):
            self._weights(i)
        step = max(1, REGISTERS // self.n) * e.isa.lanes
        e.each(0, spec.v_dim // step * step, step, lambda d: self._add(d, step, count))
        if spec.v_dim % step:
            self._add(spec.v_dim // step * step, spec.v_dim % step, count)

    def _score(self, q: Place, j: Val) -> None:
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        key = e.at(self.k, e.mul(_word(e, self.slots, j), spec.dim))
        sums = [e.constant(0.0)] * self.n

        def some(d: Val, acc: list[Val]) -> list[Val]:
            column = e.load(e.at(key, d))
            return [e.fma(e.load(e.at(q, e.add(d, i * spec.dim))), column, a) for i, a in enumerate(acc)]

        for i, total in enumerate(e.loop(0, spec.dim, lanes, sums, some)):
            score = across(e, total, e.b.fadd)
            if spec.softcap is not None:
                cap = e.constant(spec.softcap)
                score = e.b.fmul(cap, m.tanh(e, e.b.fdiv(score, cap)))
            e.store(score, e.at(self.scores, e.add(j, i * CHUNK)), 1)

    def _weights(self, i: int) -> None:
        """Scores of a head become powers; what was known before them is scaled to the same largest score."""
        e, lanes = self.e, self.e.isa.lanes
        top_at, total_at, scores = (
            e.at(self.tops, i * lanes),
            e.at(self.totals, i * lanes),
            e.at(self.scores, i * CHUNK),
        )
        known, old = [e.load(e.at(scores, c)) for c in range(0, CHUNK, lanes)], e.load(top_at)
        top = old
        for x in known:
            top = m.maximum(e, top, x)
        top = across(e, top, partial(m.maximum, e))
        factor = m.exp(e, e.b.fsub(old, top))
        total = e.constant(0.0)
        for c, x in zip(range(0, CHUNK, lanes), known):
            power = m.exp(e, e.b.fsub(x, top))
            e.store(power, e.at(scores, c))
            total = e.b.fadd(total, power)
        e.store(top, top_at)
        e.store(e.fma(e.load(total_at), factor, across(e, total, e.b.fadd)), total_at)
        sums = e.at(self.sums, i * self.spec.v_dim)

        def scale(d: Val) -> None:
            e.store(e.b.fmul(e.load(e.at(sums, d)), factor), e.at(sums, d))

        e.each(0, self.spec.v_dim, lanes, scale)

    def _add(self, first: Val, width: int, count: Val) -> None:
        """Features [first, first + width) of the chunk's values, weighted, to all heads' sums."""
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        columns = range(0, width, lanes)
        homes = [e.at(self.sums, e.add(first, i * spec.v_dim + c)) for i in range(self.n) for c in columns]

        def key(j: Val, acc: list[Val]) -> list[Val]:
            value = e.at(self.v, e.add(e.mul(_word(e, self.slots, j), spec.v_dim), first))
            loaded = [e.load(e.at(value, c)) for c in columns]
            out = []
            for i in range(self.n):
                power = e.splat(e.load_scalar(e.at(self.scores, e.add(j, i * CHUNK))))
                out += [e.fma(power, x, acc[i * len(loaded) + n]) for n, x in enumerate(loaded)]
            return out

        for home, x in zip(homes, e.loop(0, count, 1, [e.load(h) for h in homes], key)):
            e.store(x, home)

    def _finish(self, out: Place) -> None:
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        for i in range(self.n):
            inverse = e.b.fdiv(e.constant(1.0), e.load(e.at(self.totals, i * lanes)))
            sums, home = e.at(self.sums, i * spec.v_dim), e.at(out, i * spec.v_dim)

            def leave(d: Val, sums: Place = sums, home: Place = home, inverse: Val = inverse) -> None:
                e.store(e.b.fmul(e.load(e.at(sums, d)), inverse), e.at(home, d))

            e.each(0, spec.v_dim, lanes, leave)
