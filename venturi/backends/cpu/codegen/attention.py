"""Attention: softmax(scale * Q K^T + mask) V, a head at a time; of the scores only a tile of rows exists.

A task is a head and some of its queries. It packs the head's keys once, transposed, in blocks of vectors; then tiles of
`rows` queries go through three steps in first-level cache: scores with all keys, softmax, weighted sum of the values.
The sums of the first and the last step stay in registers, `vectors` to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.element import FLOAT, U8, Element, Place
from venturi.backends.cpu.codegen.emit import I32, Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.rows import across


@dataclass(frozen=True)
class AttentionSpec:
    """[batch, queries, heads * dim] where `flat`, else [batch, heads, queries, dim]; keys and values likewise, `heads`
    a multiple of `kv_heads`. A task takes `block` queries, a tile `rows`, at most `block`.

    A mask is [batch or 1, heads or 1, queries, keys]: numbers to add or, where `mask` is U8, 0 for what is not seen; a
    query that sees nothing gives 0. `mask_batch`, `mask_heads`: it is not 1 there. `causal`: query i sees keys 0 to i.
    `packed`: queries, keys and values of a token lie behind each other, in one tensor.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    scale: float
    flat: bool
    block: int
    rows: int
    vectors: int
    element: Element = FLOAT
    mask: Element | None = None
    mask_batch: bool = False
    mask_heads: bool = False
    causal: bool = False
    packed: bool = False

    def tasks(self, batch: int) -> int:
        return batch * self.heads * -(-self.queries // self.block)

    def padded_keys(self, isa: Isa) -> int:
        return -(-self.keys // isa.lanes) * isa.lanes

    def stack_bytes(self, isa: Isa) -> int:
        """Of memory that a task needs."""
        return 4 * (self.padded_keys(isa) * (self.dim + self.rows) + self.rows * self.dim)


def emit_attention(isa: Isa, spec: AttentionSpec) -> str:
    """The kernel's IR. Words: queries, keys, values (all three the same where they are packed), out, mask."""
    e = Emitter(isa)
    _Attention(e, spec).tasks()
    return e.finish()


class _Attention:
    def __init__(self, e: Emitter, spec: AttentionSpec) -> None:
        self.e, self.spec = e, spec
        self.q, self.k, self.v, self.out = (e.pointer(i, spec.element) for i in range(4))
        wide, kv_wide = spec.heads * spec.dim, spec.kv_heads * spec.dim
        self.q_row, self.k_row, self.v_row = wide, kv_wide, spec.kv_heads * spec.v_dim
        if spec.packed:
            self.k, self.v = e.at(self.k, wide), e.at(self.v, wide + kv_wide)
            self.q_row = self.k_row = self.v_row = wide + kv_wide + self.v_row
        self.mask = None if spec.mask is None else e.pointer(4, spec.mask)
        self.width = spec.padded_keys(e.isa)
        self.packed = e.stack(self.width * spec.dim)
        self.queries = e.stack(spec.rows * spec.dim)
        self.scores = e.stack(spec.rows * self.width)

    def tasks(self) -> None:
        e, spec = self.e, self.spec
        blocks = -(-spec.queries // spec.block)

        def task(t: Val) -> None:
            place, block = e.divmod(t, blocks)
            batch, head = e.divmod(place, spec.heads)
            kv_head = e.divmod(head, spec.heads // spec.kv_heads)[0]
            self._pack(self._head(self.k, batch, kv_head, spec.keys, spec.kv_heads, spec.dim, self.k_row))
            first = e.mul(block, spec.block)
            last = e.min(e.add(first, spec.block), spec.queries)
            q = self._head(self.q, batch, head, spec.queries, spec.heads, spec.dim, self.q_row)
            v = self._head(self.v, batch, kv_head, spec.keys, spec.kv_heads, spec.v_dim, self.v_row)
            out = self._head(self.out, batch, head, spec.queries, spec.heads, spec.v_dim, spec.heads * spec.v_dim)
            mask = self._mask(batch, head)

            def tile(i: Val) -> None:
                self._tile(q, v, out, mask, e.min(i, spec.queries - spec.rows))

            e.each(first, last, spec.rows, tile)

        e.each(e.begin, e.end, 1, task)

    def _head(self, x: Place, batch: Val, head: Val, length: int, heads: int, dim: int, row: int) -> Place:
        """Where a head begins; `row` is how far apart tokens are where heads lie side by side."""
        e = self.e
        if self.spec.flat:
            return e.at(x, e.add(e.mul(batch, length * row), e.mul(head, dim)))
        return e.at(x, e.mul(e.add(e.mul(batch, heads), head), length * dim))

    def _mask(self, batch: Val, head: Val) -> Place | None:
        """Of a head."""
        e, spec = self.e, self.spec
        if self.mask is None:
            return None
        number = e.add(
            e.mul(batch, (spec.heads if spec.mask_heads else 1) * int(spec.mask_batch)),
            e.mul(head, int(spec.mask_heads)),
        )
        return e.at(self.mask, e.mul(number, spec.queries * spec.keys))

    # --- keys
    def _pack(self, k: Place) -> None:
        """[key][feature] to [block of a vector's keys][feature][key], zeros beyond the last key."""
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        row = self.k_row if spec.flat else spec.dim
        zeros = e.constant(0.0)

        def block(first: Val, count: int) -> None:
            home = e.at(self.packed, e.mul(first, spec.dim))

            def some(d: Val, width: int) -> None:
                held = None if width == lanes else width
                source = [e.load(e.at(k, e.add(e.mul(e.add(first, i), row), d)), held) for i in range(count)]
                for i, x in enumerate(self._transposed(source + [zeros] * (lanes - count))[:width]):
                    e.store(x, e.at(home, e.mul(e.add(d, i), lanes)))

            self._sweep(spec.dim, some)

        whole = spec.keys - spec.keys % lanes
        e.each(0, whole, lanes, lambda i: block(i, lanes))
        if whole < spec.keys:
            block(whole, spec.keys - whole)

    def _sweep(self, size: int, body: Callable[[Val, int], None]) -> None:
        lanes = self.e.isa.lanes
        whole = size - size % lanes
        self.e.each(0, whole, lanes, lambda i: body(i, lanes))
        if whole < size:
            body(whole, size - whole)

    def _transposed(self, rows: list[Val]) -> list[Val]:
        """Square: halves of rows s apart change places, for s of 1, 2, 4 ..."""
        e, lanes = self.e, self.e.isa.lanes
        rows, step = list(rows), 1
        while step < lanes:
            low = [i if not i & step else lanes + i - step for i in range(lanes)]
            high = [i + step if not i & step else lanes + i for i in range(lanes)]
            kind = ir.VectorType(I32, lanes)
            for i in range(lanes):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i] = e.b.shuffle_vector(a, b, ir.Constant(kind, low))
                    rows[i + step] = e.b.shuffle_vector(a, b, ir.Constant(kind, high))
            step *= 2
        return rows

    # --- a tile
    def _tile(self, q: Place, v: Place, out: Place, mask: Place | None, first: Val) -> None:
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        scale = e.constant(spec.scale)
        row = self.q_row if spec.flat else spec.dim

        def fetch(i: Val) -> None:
            def some(d: Val, width: int) -> None:
                held = None if width == lanes else width
                x = e.load(e.at(q, e.add(e.mul(e.add(first, i), row), d)), held)
                e.store(e.b.fmul(x, scale), e.at(self.queries, e.add(e.mul(i, spec.dim), d)), held)

            self._sweep(spec.dim, some)

        e.each(0, spec.rows, 1, fetch)
        seen = self._seen(first, spec.rows - 1)
        self._groups(self.width // lanes, True, self._score, e.divmod(e.add(seen, lanes - 1), lanes)[0])
        masks = [None if mask is None else e.at(mask, e.mul(e.add(first, i), spec.keys)) for i in range(spec.rows)]
        inverse = [self._softmax(i, row, first) for i, row in enumerate(masks)]
        weigh = partial(self._weigh, v, out, first, inverse, seen)
        self._groups(-(-spec.v_dim // lanes), spec.v_dim % lanes == 0, weigh)

    def _seen(self, first: Val, i: int) -> Val:
        """How many keys row `i` of the tile sees."""
        return self.e.min(self.e.add(first, i + 1), self.spec.keys) if self.spec.causal else self.spec.keys

    def _groups(self, vectors: int, full: bool, body: Callable[[Val, int], None], needed: Val | None = None) -> None:
        """`body(first vector, vectors)` over all of them, as many at a time as registers hold. Unless all are `full`,
        the group with the last one has code of its own. Groups beyond the first `needed` vectors are left out."""
        e, step = self.e, self.spec.vectors
        whole = (vectors if full else vectors - 1) // step * step
        needed = vectors if needed is None else needed
        e.each(0, e.min(needed, whole), step, lambda i: body(i, step))
        if whole == vectors:
            return
        if isinstance(needed, int):
            body(whole, vectors - whole)
        else:
            e.when(e.b.icmp_signed(">", needed, e.i64(whole)), lambda: body(whole, vectors - whole))

    def _products(
        self, count: Val, factor: Callable[[int, Val], Place], column: Callable[[Val, int], Val], width: int
    ) -> list[Val]:
        """Sums over k in [0, count) of factor(row, k) times column(k, vector), a row after the other."""
        e, rows = self.e, self.spec.rows

        def step(k: Val, acc: list[Val]) -> Sequence[Val]:
            columns, acc = [column(k, c) for c in range(width)], list(acc)
            for i in range(rows):
                x = e.splat(e.load_scalar(factor(i, k)))
                for c in range(width):
                    acc[i * width + c] = e.fma(x, columns[c], acc[i * width + c])
            return acc

        return e.loop(0, count, 1, [e.constant(0.0)] * (rows * width), step)

    def _score(self, first: Val, width: int) -> None:
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        home = e.at(self.packed, e.mul(first, lanes * spec.dim))
        found = self._products(
            spec.dim,
            lambda i, d: e.at(self.queries, e.add(d, i * spec.dim)),
            lambda d, c: e.load(e.at(home, e.add(e.mul(d, lanes), c * lanes * spec.dim))),
            width,
        )
        for i in range(spec.rows):
            for c in range(width):
                at = e.add(e.mul(first, lanes), i * self.width + c * lanes)
                e.store(found[i * width + c], e.at(self.scores, at))

    def _softmax(self, i: int, mask: Place | None, first: Val) -> Val:
        """Powers of a row's scores in their place, 0 for keys it does not see; one over their sum, in all lanes."""
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        row, seen = e.at(self.scores, i * self.width), self._seen(first, i)
        common = e.mul(e.divmod(self._seen(first, 0), lanes)[0], lanes)
        last = e.mul(e.divmod(e.add(self._seen(first, spec.rows - 1), lanes - 1), lanes)[0], lanes)

        def fold(start: float, step: Callable[[Val, Val, Val | None], Val]) -> Val:
            """`step(sum, place, keys seen from there on)` over vectors of keys; None stands for all of a vector."""
            acc = e.loop(0, common, lanes, [e.constant(start)], lambda at, a: [step(a[0], at, None)])

            def part(at: Val, a: list[Val]) -> list[Val]:
                return [step(a[0], at, e.max(e.sub(seen, at), 0))]

            return e.loop(common, last, lanes, acc, part)[0]

        def known(x: Val, left: Val | None, other: float) -> Val:
            return x if left is None else e.b.select(e.mask(e.min(left, lanes)), x, e.constant(other))

        def larger(acc: Val, at: Val, left: Val | None) -> Val:
            x = e.load(e.at(row, at))
            if mask is not None:
                x = self._masked(x, e.load(e.at(mask, at), left))
                e.store(x, e.at(row, at))
            return m.maximum(e, acc, known(x, left, -float("inf")))

        top = across(e, fold(-float("inf"), larger), partial(m.maximum, e))
        if mask is not None:
            blind = e.b.fcmp_ordered("==", top, e.constant(-float("inf")))
            top = e.b.select(blind, e.constant(0.0), top)

        def add(acc: Val, at: Val, left: Val | None) -> Val:
            power = known(m.exp(e, e.b.fsub(e.load(e.at(row, at)), top)), left, 0.0)
            e.store(power, e.at(row, at))
            return e.b.fadd(acc, power)

        inverse = e.b.fdiv(e.constant(1.0), across(e, fold(0.0, add), e.b.fadd))
        return inverse if mask is None else e.b.select(blind, e.constant(0.0), inverse)

    def _masked(self, x: Val, mask: Val) -> Val:
        e = self.e
        if self.spec.mask is not U8:
            return e.b.fadd(x, mask)
        seen = e.b.fcmp_ordered("!=", mask, e.constant(0.0))
        return e.b.select(seen, x, e.constant(-float("inf")))

    def _weigh(
        self, v: Place, out: Place, start: Val, inverse: Sequence[Val], seen: Val, first: Val, width: int
    ) -> None:
        """Sums of the values of the first `seen` keys."""
        e, spec, lanes = self.e, self.spec, self.e.isa.lanes
        row, out_row = (self.v_row, spec.heads * spec.v_dim) if spec.flat else (spec.v_dim, spec.v_dim)
        left = spec.v_dim % lanes
        ends = isinstance(first, int) and first + width == -(-spec.v_dim // lanes)
        held = [left if left and ends and c == width - 1 else None for c in range(width)]
        at = e.mul(first, lanes)
        found = self._products(
            seen,
            lambda i, j: e.at(self.scores, e.add(j, i * self.width)),
            lambda j, c: e.load(e.at(v, e.add(e.mul(j, row), e.add(at, c * lanes))), held[c]),
            width,
        )
        for i in range(spec.rows):
            for c in range(width):
                place = e.add(e.mul(e.add(start, i), out_row), e.add(at, c * lanes))
                e.store(e.b.fmul(found[i * width + c], inverse[i]), e.at(out, place), held[c])
