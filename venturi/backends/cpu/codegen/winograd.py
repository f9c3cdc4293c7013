"""3x3 convolutions of stride 1 by Winograd's minimal filtering: fewer products for some more sums.

F(m x m, 3 x 3) computes m x m outputs from an n x n patch, n = m + 2, with n^2 instead of 9 m^2 products a channel.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015); the matrices are Toom and Cook's for
the points 0, +-p, infinity. F(4) uses p = 3/4 and 3/2 rather than 1 and 2: its rounding error is a fifth of theirs.

Two loops: patches are transformed into scratch memory as [point][tile][channel]; then n^2 products of [tiles, channels]
by [channels, block of output channels], whose results are transformed back while they are in the second cache. A
result that is not finite raises a flag at the start of the scratch memory: where an input is NaN or infinite, the
transforms spread it over the whole tile, and the caller computes such a convolution again directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from venturi.backends.cpu.codegen.activation import Post, emit_post
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa

POINTS: dict[int, tuple[Fraction, ...]] = {2: (Fraction(1),), 4: (Fraction(3, 4), Fraction(3, 2))}
FLAG_WORDS = 16


@dataclass(frozen=True)
class WinogradSpec:
    """`size` is m. A task of the second loop has `groups` times `rows` tiles by `vectors` vectors of channels."""

    geometry: ConvGeometry
    size: int
    rows: int
    vectors: int
    groups: int
    unroll: int
    bias: bool
    post: Post

    @property
    def patch(self) -> int:
        return self.size + 2

    @property
    def across(self) -> tuple[int, int]:
        """Tiles down and along the image."""
        return -(-self.geometry.out_height // self.size), -(-self.geometry.out_width // self.size)

    def tiles(self, batch: int) -> int:
        return batch * self.across[0] * self.across[1]

    def scratch(self, batch: int) -> int:
        """Bytes: the flag, then the transformed patches."""
        return 4 * (FLAG_WORDS + self.patch**2 * self.tiles(batch) * self.geometry.channels)

    def product_tasks(self, isa: Isa, batch: int) -> int:
        blocks = -(-self.geometry.out_channels // (self.vectors * isa.lanes))
        return blocks * -(-self.tiles(batch) // (self.groups * self.rows))


def _product(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients in x^2 of the product of x^2 - r^2, from the constant upwards."""
    out = [Fraction(1)]
    for r in roots:
        out = [
            (out[k - 1] if k else Fraction(0)) - (r * r * out[k] if k < len(out) else 0) for k in range(len(out) + 1)
        ]
    return out


@functools.cache
def weight_matrix(size: int) -> torch.Tensor:
    """G, [n, 3] in fp64: rows for 0, +p, -p, ..., infinity."""
    points = [Fraction(0)] + [s * p for p in POINTS[size] for s in (1, -1)]
    rows = []
    for i, p in enumerate(points):
        scale = Fraction(1)
        for j, q in enumerate(points):
            scale *= 1 if i == j else p - q
        rows.append([float(Fraction(1) / scale), float(p / scale), float(p * p / scale)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack_winograd(weight: torch.Tensor, size: int, block: int) -> torch.Tensor:
    """[out, in, 3, 3] to [out / block, n * n, in, block], transformed in fp64, filled up with zeros."""
    g = weight_matrix(size)
    out, channels = weight.shape[:2]
    blocks, n2 = -(-out // block), (size + 2) ** 2
    padded = weight.new_zeros((blocks * block, channels, n2))
    padded[:out] = weight.double().reshape(out, channels, 9) @ torch.kron(g, g).T
    return padded.view(blocks, block, channels, n2).permute(0, 3, 2, 1).contiguous()


def _weighted(e: Emitter, terms: Sequence[tuple[Fraction, Val]]) -> Val:
    """The sum of constants times vectors."""
    total = None
    for c, x in sorted(terms, key=lambda t: t[0] != 1):
        if not c:
            continue
        if total is None:
            total = x if c == 1 else e.b.fmul(e.constant(float(c)), x)
        else:
            total = e.b.fadd(total, x) if c == 1 else e.fma(e.constant(float(c)), x, total)
    return total


def _patch_line(e: Emitter, size: int, d: Sequence[Val]) -> list[Val]:
    """B^T d: rows for 0, +p, -p, ..., infinity."""
    pairs = POINTS[size]
    whole = _product(pairs)
    out = [_weighted(e, [(c, d[2 * k]) for k, c in enumerate(whole)])]
    for i, p in enumerate(pairs):
        rest = _product([q for j, q in enumerate(pairs) if j != i])
        even = _weighted(e, [(c, d[2 * k + 2]) for k, c in enumerate(rest)])
        odd = _weighted(e, [(c * p, d[2 * k + 1]) for k, c in enumerate(rest)])
        out += [e.b.fadd(even, odd), e.b.fsub(even, odd)]
    return [*out, _weighted(e, [(c, d[2 * k + 1]) for k, c in enumerate(whole)])]


def _result_line(e: Emitter, size: int, x: Sequence[Val]) -> list[Val]:
    """A^T x."""
    pairs = POINTS[size]
    sums = [e.b.fadd(x[2 * i + 1], x[2 * i + 2]) for i in range(len(pairs))]
    differences = [e.b.fsub(x[2 * i + 1], x[2 * i + 2]) for i in range(len(pairs))]
    one = Fraction(1)
    out = []
    for k in range(size):
        terms = [(p**k, s) for p, s in zip(pairs, differences if k % 2 else sums)]
        terms += [(one, x[0])] if k == 0 else []
        terms += [(one, x[-1])] if k == size - 1 else []
        out.append(_weighted(e, terms))
    return out


def emit_patches(isa: Isa, spec: WinogradSpec) -> str:
    """The first loop. Words: x, zeros (a pixel's channels of them), scratch, tiles. Tasks: tiles."""
    e = Emitter(isa)
    x, zeros, scratch, tiles = e.pointer(0), e.pointer(1), e.pointer(2), e.word(3)
    out = e.at(scratch, FLAG_WORDS)
    g, n, m = spec.geometry, spec.patch, spec.size
    down, along = spec.across

    def task(t: Val) -> None:
        e.when(e.b.icmp_signed("==", e.i64(t), e.i64(0)), lambda: e.store_word(0, scratch))
        place, tx = e.divmod(t, along)
        image, ty = e.divmod(place, down)
        y0, x0 = e.sub(e.mul(ty, m), g.pads[0]), e.sub(e.mul(tx, m), g.pads[1])
        pixels = []
        for i in range(n):
            y = e.add(y0, i)
            line = e.mul(e.add(e.mul(image, g.height), y), g.width)
            for j in range(n):
                column = e.add(x0, j)
                met = e.b.and_(e.inside(y, g.height), e.inside(column, g.width))
                pixels.append(e.choose(met, e.at(x, e.mul(e.add(line, column), g.channels)), zeros))

        def channels(c: Val, count: int | None) -> None:
            d = [[e.load(e.at(pixels[i * n + j], c), count) for j in range(n)] for i in range(n)]
            half = [_patch_line(e, m, [d[i][j] for i in range(n)]) for j in range(n)]
            for i in range(n):
                for j, value in enumerate(_patch_line(e, m, [half[k][i] for k in range(n)])):
                    at = e.add(e.mul(e.add(e.mul(tiles, i * n + j), t), g.channels), c)
                    e.store(value, e.at(out, at), count)

        _by_lanes(e, g.channels, channels)

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def _by_lanes(e: Emitter, size: int, body: Callable[[Val, int | None], None]) -> None:
    whole = size - size % e.isa.lanes
    e.each(0, whole, e.isa.lanes, lambda c: body(c, None))
    if whole < size:
        body(whole, size - whole)


def emit_products(isa: Isa, spec: WinogradSpec) -> str:
    """The second loop. Words: scratch, weights, bias, residual, out, tiles."""
    e = Emitter(isa)
    kernel = _Products(e, spec)
    e.each(e.begin, e.end, 1, kernel.task)
    return e.finish()


class _Products:
    def __init__(self, e: Emitter, spec: WinogradSpec) -> None:
        self.e, self.spec, self.g = e, spec, spec.geometry
        self.scratch, self.weight, self.bias, self.residual, self.out = (e.pointer(i) for i in range(5))
        self.tiles = e.word(5)
        self.width = spec.vectors * e.isa.lanes
        self.block = spec.groups * spec.rows
        self.sums = e.stack(spec.patch**2 * self.block * self.width)

    def task(self, t: Val) -> None:
        e, spec, g = self.e, self.spec, self.g
        blocks = e.b.udiv(e.add(self.tiles, self.block - 1), e.i64(self.block))
        channel, place = e.b.udiv(t, blocks), e.b.urem(t, blocks)
        first = e.min(e.mul(place, self.block), e.sub(self.tiles, self.block))
        whole, left = divmod(g.out_channels, self.width)

        def run(vectors: int, masked: int | None) -> None:
            self._multiply(first, channel, vectors)
            e.each(0, self.block, 1, lambda i: self._tile(e.add(first, i), i, channel, vectors, masked))

        full = partial(run, spec.vectors, None)
        rest = partial(run, -(-left // e.isa.lanes), left % e.isa.lanes or None)
        if left and whole:
            e.switch(e.b.udiv(channel, e.i64(whole)), [full, rest])
        else:
            (rest if left else full)()

    def _multiply(self, first: Val, channel: Val, vectors: int) -> None:
        e, spec, g, lanes = self.e, self.spec, self.g, self.e.isa.lanes
        patches = e.at(self.scratch, FLAG_WORDS)
        weights = e.at(self.weight, e.mul(channel, spec.patch**2 * g.channels * self.width))

        def group(p: Val, r: Val) -> None:
            tile = e.add(first, e.mul(r, spec.rows))
            line = e.at(patches, e.mul(e.add(e.mul(self.tiles, p), tile), g.channels))
            panel = e.at(weights, e.mul(p, g.channels * self.width))
            step = next(u for u in (spec.unroll, 2, 1) if g.channels % u == 0)

            def some(c: Val, acc: list[Val]) -> list[Val]:
                acc, at, w = list(acc), e.at(line, c), e.at(panel, e.mul(c, self.width))
                for u in range(step):
                    b = [e.load(e.at(w, u * self.width + v * lanes)) for v in range(vectors)]
                    for i in range(spec.rows):
                        a = e.splat(e.load_scalar(e.at(at, i * g.channels + u)))
                        for v in range(vectors):
                            acc[i * vectors + v] = e.fma(a, b[v], acc[i * vectors + v])
                return acc

            acc = e.loop(0, g.channels, step, [e.constant(0.0)] * (spec.rows * vectors), some)
            home = e.at(self.sums, e.mul(e.add(e.mul(p, self.block), e.mul(r, spec.rows)), self.width))
            for i in range(spec.rows):
                for v in range(vectors):
                    e.store(acc[i * vectors + v], e.at(home, i * self.width + v * lanes))

        e.each(0, spec.patch**2, 1, lambda p: e.each(0, spec.groups, 1, lambda r: group(p, r)))

    def _tile(self, tile: Val, own: Val, channel: Val, vectors: int, masked: int | None) -> None:
        """Transform one tile's results and bring them to the output; parts beyond the image are dropped."""
        e, spec, m, n = self.e, self.spec, self.spec.size, self.spec.patch
        place, tx = e.divmod(tile, spec.across[1])
        image, ty = e.divmod(place, spec.across[0])
        y0, x0, lane0 = e.mul(ty, m), e.mul(tx, m), e.mul(channel, self.width)
        for v in range(vectors):
            count = masked if v == vectors - 1 else None
            lane = e.add(lane0, v * e.isa.lanes)
            at = [e.add(e.mul(e.add(own, p * self.block), self.width), v * e.isa.lanes) for p in range(n * n)]
            x = [[e.load(e.at(self.sums, at[i * n + j])) for j in range(n)] for i in range(n)]
            half = [_result_line(e, m, [x[i][j] for i in range(n)]) for j in range(n)]
            bias = e.load(e.at(self.bias, lane), count) if spec.bias else None
            broken = e.constant(0.0)
            for i in range(m):
                values = _result_line(e, m, [half[j][i] for j in range(n)])
                for value in values:
                    broken = e.fma(value, e.constant(0.0), broken)
                self._store_line(image, e.add(y0, i), x0, lane, values, bias, count)
            self._report(broken)

    def _store_line(
        self, image: Val, y: Val, x0: Val, lane: Val, values: list[Val], bias: Val | None, count: int | None
    ) -> None:
        e, spec, g, m = self.e, self.spec, self.g, self.spec.size

        def store(j: int) -> None:
            pixel = e.add(e.mul(e.add(e.mul(image, g.out_height), y), g.out_width), e.add(x0, j))
            at = e.add(e.mul(pixel, g.out_channels), lane)
            value = values[j] if bias is None else e.b.fadd(values[j], bias)
            other = e.load(e.at(self.residual, at), count) if spec.post.residual else None
            e.store(emit_post(e, spec.post, value, other), e.at(self.out, at), count)

        def line() -> None:
            for j in range(m):
                if g.out_width % m == 0:
                    store(j)
                else:
                    e.when(e.inside(e.add(x0, j), g.out_width), partial(store, j))

        line() if g.out_height % m == 0 else e.when(e.inside(y, g.out_height), line)

    def _report(self, broken: Val) -> None:
        e = self.e
        wrong = e.any(e.b.fcmp_unordered("uno", broken, broken))
        e.when(wrong, lambda: e.store_word(1, self.scratch))
