"""Convolutions and products of matrices as one register-blocked loop nest over NHWC, nothing gathered beforehand.

A tile is `rows` neighbouring output pixels by `vectors` vectors of output channels, held in registers while the loop
runs over kernel rows, columns and input channels; each step multiplies a broadcast input by a vector of weights.
Columns that meet the padding leave rows of the tile out, which is known when the code is written: tiles at the left
and right edge have code of their own. Weights lie as [block][kernel row][kernel column][channel][lane].

With `depth` the sums of a task's tiles wait in stack memory while all tiles go through `depth` channels of one kernel
position after another, so that these weights stay in the first-level cache (Goto and van de Geijn's blocking of K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from venturi.backends.cpu.codegen.activation import Post, emit_post
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.geometry import ConvGeometry, kernel_rows, tile_starts
from venturi.backends.cpu.codegen.isa import Isa

X, WEIGHT, BIAS, RESIDUAL, OUT = range(5)
# Numbers in a cache line, and from one to the next that meets it in its set of the first cache: pixels so far apart are
# not asked for, the next ones would drive out those in use.
LINE, WAY = 16, 1024


@dataclass(frozen=True)
class DirectSpec:
    """`block` tiles make a task. `channels_first`: threads share out the channels rather than the pixels. `depth` 0
    runs through all of a tile's products at once."""

    geometry: ConvGeometry
    rows: int
    vectors: int
    block: int
    unroll: int
    depth: int
    channels_first: bool
    bias: bool
    post: Post

    @property
    def tiles_a_row(self) -> int:
        return -(-self.geometry.out_width // self.rows)

    def channel_blocks(self, isa: Isa) -> int:
        return -(-self.geometry.out_channels // (self.vectors * isa.lanes))

    def tasks(self, isa: Isa, count: int) -> int:
        """For `count` images, or one row of `count` pixels where the geometry has width 0."""
        flat = self.geometry.width == 0
        tiles = -(-count // self.rows) if flat else self.geometry.out_height * self.tiles_a_row
        return (1 if flat else count) * -(-tiles // self.block) * self.channel_blocks(isa)


def pack_weights(weight: torch.Tensor, block: int) -> torch.Tensor:
    """[out, in, kh, kw] to [out / block, kh, kw, in, block], filled up with zeros."""
    out, channels, kh, kw = weight.shape
    blocks = -(-out // block)
    padded = weight.new_zeros((blocks * block, channels, kh, kw))
    padded[:out] = weight
    return padded.view(blocks, block, channels, kh, kw).permute(0, 3, 4, 2, 1).contiguous()


def emit_direct(isa: Isa, spec: DirectSpec) -> str:
    """The kernel's IR. Words: x, weights, bias, residual, out, images (or pixels of the row), the guard's address.

    Nothing is done where the guard has an address and the word there is 0.
    """
    e = Emitter(isa)
    _Direct(e, spec).tasks()
    return e.finish()


class _Direct:
    def __init__(self, e: Emitter, spec: DirectSpec) -> None:
        self.e, self.spec, self.g = e, spec, spec.geometry
        self.x, self.weight, self.bias, self.residual, self.out = (e.pointer(i) for i in range(5))
        self.width = spec.vectors * e.isa.lanes
        self.taps = self.g.kernel[0] * self.g.kernel[1] * self.g.channels
        self.flat, self.images, self.pixels = self.g.width == 0, e.word(5), e.word(5)
        patterns: list[tuple[tuple[int, ...], ...]]
        if self.flat:
            self.images, self.starts, patterns = 1, [], [(tuple(range(spec.rows)),)]
            self.tiles = e.b.udiv(e.add(self.pixels, spec.rows - 1), e.i64(spec.rows))
            self.blocks = e.b.udiv(e.add(self.tiles, spec.block - 1), e.i64(spec.block))
        else:
            self.starts = tile_starts(self.g.out_width, spec.rows)
            patterns = [self.g.valid_rows(s, spec.rows) for s in self.starts]
            self.tiles = self.g.out_height * spec.tiles_a_row
            self.blocks = -(-self.tiles // spec.block)
        self.patterns = list(dict.fromkeys(patterns))
        self.kinds = [self.patterns.index(p) for p in patterns]
        self.sums = e.stack(spec.block * spec.rows * self.width if spec.depth else 1)

    def tasks(self) -> None:
        e, spec = self.e, self.spec
        channel_blocks = spec.channel_blocks(e.isa)

        def task(t: Val) -> None:
            if spec.channels_first:
                blocks = e.mul(self.images, self.blocks)
                channel, place = e.b.udiv(t, blocks), e.b.urem(t, blocks)
            else:
                place, channel = e.divmod(t, channel_blocks)
            image, block = (0, place) if self.flat else e.divmod(place, self.blocks)
            self._task(image, block, channel)

        always = e.stack(2)
        e.store_word(1, always)
        given = e.b.icmp_signed("!=", e.word(6), e.i64(0))
        guard = e.choose(given, e.pointer(6), always)
        raised = e.b.icmp_signed("!=", e.load_word(guard), e.i64(0))
        e.each(e.begin, e.b.select(raised, e.end, e.begin), 1, task)

    def _task(self, image: Val, block: Val, channel: Val) -> None:
        e, spec, g = self.e, self.spec, self.g
        first = e.mul(block, spec.block)
        last = e.min(e.add(first, spec.block), self.tiles)
        whole, left = divmod(g.out_channels, self.width)
        tail = -(-left // e.isa.lanes)

        def run(vectors: int, masked: int | None) -> None:
            if spec.depth:
                self._blocked(image, first, last, channel, vectors, masked)
                return

            def tile(t: Val) -> None:
                y, column = self._place(t)
                kinds = [partial(self._tile, p, image, y, column, channel, vectors, masked) for p in self.patterns]
                e.switch(e.table(self.kinds, column), kinds)

            e.each(first, last, 1, tile)

        full = partial(run, spec.vectors, None)
        rest = partial(run, tail, left % e.isa.lanes or None)
        if left and whole:
            e.switch(e.b.udiv(e.i64(channel), e.i64(whole)), [full, rest])
        else:
            (rest if left else full)()

    def _tile(
        self,
        pattern: Sequence[Sequence[int]],
        image: Val,
        y: Val,
        column: Val,
        channel: Val,
        vectors: int,
        masked: int | None,
    ) -> None:
        e, g, spec = self.e, self.g, self.spec
        x0 = self._start(column)
        top = e.sub(e.mul(y, g.strides[0]), g.pads[0])
        lowest, highest = kernel_rows(e, g, top)
        base = e.add(e.mul(e.add(e.mul(image, g.height), top), g.width), e.sub(e.mul(x0, g.strides[1]), g.pads[1]))
        weights = e.at(self.weight, e.mul(channel, self.taps * self.width))
        lane0 = e.mul(channel, self.width)
        start = self._initial(lane0, vectors, masked)
        acc = [start[v] for _ in range(spec.rows) for v in range(vectors)]

        def kernel_row(r: Val, acc: list[Val]) -> Sequence[Val]:
            line = e.at(self.x, e.mul(e.add(base, e.mul(r, g.dilations[0] * g.width)), g.channels))
            row_weights = e.at(weights, e.mul(r, g.kernel[1] * g.channels * self.width))
            for first, count, rows in self._runs(pattern):
                acc = self._products(line, row_weights, first, count, rows, vectors, acc)
            return acc

        if self.flat and not isinstance(x0, int):
            line = e.at(self.x, e.mul(base, g.channels))
            acc = self._asking(line, weights, self._out_offset(image, y, x0, lane0), vectors, acc)
        else:
            acc = e.loop(lowest, highest, 1, acc, kernel_row)
        lanes = e.isa.lanes
        place = e.stack(spec.rows * self.width)
        for i in range(spec.rows):
            for v in range(vectors):
                e.store(acc[i * vectors + v], e.at(place, (i * vectors + v) * lanes))
        self._leave(place, self._out_offset(image, y, x0, lane0), x0, vectors, masked)

    def _place(self, tile: Val) -> tuple[Val, Val]:
        """Row of the output and number along it."""
        return (0, tile) if self.flat else self.e.divmod(tile, self.spec.tiles_a_row)

    def _start(self, column: Val) -> Val:
        """The first pixel of tile `column` of a row; the last tile overlaps its neighbour rather than stick out."""
        e, rows = self.e, self.spec.rows
        if self.flat:
            return e.min(e.mul(column, rows), e.sub(self.pixels, rows))
        return e.table(self.starts, column)

    def _out_offset(self, image: Val, y: Val, x0: Val, lane0: Val) -> Val:
        e, g = self.e, self.g
        pixel = e.add(e.mul(e.add(e.mul(image, g.out_height), y), g.out_width), x0)
        return e.add(e.mul(pixel, g.out_channels), lane0)

    def _leave(self, sums: Val, offset: Val, pixel: Val, vectors: int, masked: int | None) -> None:
        """Bring the sums of a tile that begins with `pixel` of its row to the output: residual, activation, store."""
        e, g, spec = self.e, self.g, self.spec

        def row(i: Val) -> None:
            home = e.add(offset, g.moved(e, e.add(pixel, i)))
            for v in range(vectors):
                at = e.add(home, e.add(e.mul(i, g.out_channels), v * e.isa.lanes))
                count = masked if v == vectors - 1 else None
                other = e.load(e.at(self.residual, at), count) if spec.post.residual else None
                value = e.load(e.at(sums, e.add(e.mul(i, vectors * e.isa.lanes), v * e.isa.lanes)))
                e.store(emit_post(e, spec.post, value, other), e.at(self.out, at), count)

        e.each(0, spec.rows, 1, row)

    def _blocked(self, image: Val, first: Val, last: Val, channel: Val, vectors: int, masked: int | None) -> None:
        e, g, spec = self.e, self.g, self.spec
        size = spec.rows * vectors * e.isa.lanes
        lane0 = e.mul(channel, self.width)
        weights = e.at(self.weight, e.mul(channel, self.taps * self.width))
        start = self._initial(lane0, vectors, masked)

        def clear(i: Val) -> None:
            for v in range(vectors):
                e.store(start[v], e.at(self.sums, e.add(e.mul(i, vectors * e.isa.lanes), v * e.isa.lanes)))

        e.each(0, e.mul(e.sub(last, first), spec.rows), 1, clear)
        sets = list(dict.fromkeys(p[s] for p in self.patterns for s in range(g.kernel[1])))
        choice = [sets.index(self.patterns[k][s]) for s in range(g.kernel[1]) for k in self.kinds]

        def chunk(r: Val, s: Val, c0: Val) -> None:
            c1 = e.min(e.add(c0, spec.depth), g.channels)
            panel = e.at(weights, e.mul(e.mul(e.add(e.mul(r, g.kernel[1]), s), g.channels), self.width))

            def tile(t: Val) -> None:
                y, column = self._place(t)
                sums = e.at(self.sums, e.mul(e.sub(t, first), size))
                top = e.add(e.sub(e.mul(y, g.strides[0]), g.pads[0]), e.mul(r, g.dilations[0]))
                left = e.sub(e.mul(self._start(column), g.strides[1]), g.pads[1])
                left = e.add(left, e.mul(s, g.dilations[1]))
                line = e.at(self.x, e.mul(e.add(e.mul(e.add(e.mul(image, g.height), top), g.width), left), g.channels))
                codes = [partial(self._chunk, rows, line, panel, sums, c0, c1, vectors) for rows in sets]
                kind = 0 if self.flat else e.table(choice, e.add(e.mul(s, spec.tiles_a_row), column))
                run = partial(e.switch, kind, codes)
                e.when(e.inside(top, g.height), run) if g.pads[0] or g.pads[2] else run()

            e.each(first, last, 1, tile)

        def position(r: Val, s: Val) -> None:
            e.each(0, g.channels, spec.depth, partial(chunk, r, s))

        e.each(0, g.kernel[0], 1, lambda r: e.each(0, g.kernel[1], 1, partial(position, r)))

        def leave(t: Val) -> None:
            y, column = self._place(t)
            start = self._start(column)
            offset = self._out_offset(image, y, start, lane0)
            self._leave(e.at(self.sums, e.mul(e.sub(t, first), size)), offset, start, vectors, masked)

        e.each(first, last, 1, leave)

    def _chunk(self, rows: Sequence[int], line: Val, panel: Val, sums: Val, c0: Val, c1: Val, vectors: int) -> None:
        """Add the products of channels [c0, c1) to a tile's waiting sums."""
        e, lanes = self.e, self.e.isa.lanes
        at = [e.at(sums, (i * vectors + v) * lanes) for i in rows for v in range(vectors)]
        found = self._steps(line, panel, c0, c1, rows, vectors, [e.load(a) for a in at])
        for a, value in zip(at, found):
            e.store(value, a)

    def _initial(self, lane0: Val, vectors: int, masked: int | None) -> list[Val]:
        e = self.e
        if not self.spec.bias:
            return [e.constant(0.0)] * vectors
        bias = e.at(self.bias, lane0)
        lanes = e.isa.lanes
        return [e.load(e.at(bias, v * lanes), masked if v == vectors - 1 else None) for v in range(vectors)]

    def _runs(self, pattern: Sequence[Sequence[int]]) -> list[tuple[int, int, Sequence[int]]]:
        """(first tap, taps, rows): neighbouring columns of the kernel with the same rows are one run of memory."""
        runs: list[tuple[int, int, Sequence[int]]] = []
        for tap, rows in enumerate(pattern):
            if runs and runs[-1][2] == rows and self.g.dilations[1] == 1:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, rows)
            else:
                runs.append((tap, 1, rows))
        return [run for run in runs if run[2]]

    def _products(
        self, line: Val, weights: Val, tap: int, taps: int, rows: Sequence[int], vectors: int, acc: list[Val]
    ) -> list[Val]:
        e, g = self.e, self.g
        source = e.at(line, tap * g.dilations[1] * g.channels)
        panel = e.at(weights, tap * g.channels * self.width)
        own = [acc[i * vectors + v] for i in rows for v in range(vectors)]
        own = self._steps(source, panel, 0, taps * g.channels, rows, vectors, own)
        acc = list(acc)
        for n, i in enumerate(rows):
            acc[i * vectors : (i + 1) * vectors] = own[n * vectors : (n + 1) * vectors]
        return acc

    def _asking(self, line: Val, panel: Val, out: Val, vectors: int, acc: list[Val]) -> list[Val]:
        """All products of a tile of a row of pixels; on the way, a few lines a step, what the tile's results touch and
        the next tile's pixels are asked for. ResNet-50, batch 8, Zen 4: 276 ms without, 252 with."""
        e, g, spec = self.e, self.g, self.spec
        rows, step = spec.rows, spec.unroll if g.channels % spec.unroll == 0 else 1
        steps = g.channels // step
        each = -(-rows // max(1, steps))
        asking = min(steps, -(-rows // each))
        touched = [(self.out, True), *([(self.residual, False)] if spec.post.residual else [])]
        pixels = -(-rows * step // LINE) if g.channels % WAY else 0

        def ask_touched(k: Val) -> None:
            for i in range(each):
                row = e.add(e.mul(e.b.udiv(e.i64(k), e.i64(step)), each), i)
                home = e.add(out, e.mul(row, g.out_channels))
                for place, write in touched:
                    for lane in range(0, vectors * e.isa.lanes, LINE):
                        e.prefetch(e.at(place, e.add(home, lane)), write=write)

        def ask_pixels(k: Val) -> None:
            number = e.b.udiv(e.b.urem(e.i64(k), e.i64(LINE)), e.i64(step))
            for i in range(pixels):
                row = e.add(e.add(e.mul(number, pixels), i), rows)
                e.prefetch(e.at(line, e.add(e.mul(row, g.channels), k)))

        def some(first: bool, k: Val, acc: list[Val]) -> list[Val]:
            if first:
                ask_touched(k)
            ask_pixels(k)
            return self._step(e.at(line, k), e.at(panel, e.mul(k, self.width)), step, range(rows), vectors, acc)

        acc = e.loop(0, asking * step, step, acc, partial(some, True))
        return e.loop(asking * step, g.channels, step, acc, partial(some, False)) if asking < steps else acc

    def _steps(
        self, line: Val, panel: Val, start: Val, stop: Val, rows: Sequence[int], vectors: int, acc: list[Val]
    ) -> list[Val]:
        """Products of channels [start, stop) for some rows of a tile; `acc` holds these rows only."""
        e, g = self.e, self.g
        static = isinstance(start, int) and isinstance(stop, int)
        step = self.spec.unroll if static or g.channels % self.spec.unroll == 0 else 1

        def some(k: Val, count: int, acc: list[Val]) -> list[Val]:
            return self._step(e.at(line, k), e.at(panel, e.mul(k, self.width)), count, rows, vectors, acc)

        if not static:
            return e.loop(start, stop, step, acc, lambda k, acc: some(k, step, acc))
        whole = stop - (stop - start) % step
        acc = e.loop(start, whole, step, acc, lambda k, acc: some(k, step, acc))
        return some(whole, stop - whole, acc) if stop > whole else acc

    def _step(self, at: Val, w: Val, count: int, rows: Sequence[int], vectors: int, acc: list[Val]) -> list[Val]:
        """The products of `count` channels from `at` on with the weights from `w` on."""
        e, g, acc = self.e, self.g, list(acc)
        for u in range(count):
            b = [e.load(e.at(w, u * self.width + v * e.isa.lanes)) for v in range(vectors)]
            for n, i in enumerate(rows):
                a = e.splat(e.load_scalar(e.at(at, i * g.strides[1] * g.channels + u)))
                for v in range(vectors):
                    acc[n * vectors + v] = e.fma(a, b[v], acc[n * vectors + v])
        return acc
