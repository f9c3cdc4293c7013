"""Convolutions and products of bf16 and bytes on what multiplies them (see `units`), in NHWC.

A step takes 64 bytes of K: 32 bf16 or 64 bytes. Pixels are numbered through all images; the last group of them overlaps
its neighbour rather than stick out.

Where the image's rows cannot be read as they lie (kernels larger than one, strides, padding, channels that do not fill
steps, rows that meet in one set of the cache), a task first gathers its pixels' operands,
[pixel][kernel row][kernel column][channel], with zeros for padding and for what K lacks; where integers stand for
numbers, with the one that stands for zero. Weights lie as
[block of 32 channels][step][half][16 groups of K][16 channels][group].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from llvmlite import ir

from venturi.backends.cpu.codegen.activation import Post, emit_post
from venturi.backends.cpu.codegen.dynamic import bytes_of, numbers_of
from venturi.backends.cpu.codegen.element import BF16, FLOAT, I8, S8, S32, Element, Place, widen
from venturi.backends.cpu.codegen.emit import I32, I64, Emitter, Val
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.mathlib import quantize
from venturi.backends.cpu.codegen.units import BLOCK, HALF, ROW_BYTES, TILE_BYTES, Dots, Tiles, Unit, Wanted

# Pixels so many bytes apart meet in one set of the first cache, 64 sets of 64 bytes: more of them than ways do not fit.
WAY_BYTES, WAYS = 4096, 8
RESIDUAL_SCALE, RESIDUAL_SHIFT, OUT_SCALE, OUT_ZERO, WITHIN_SCALE, WITHIN_ZERO, WITHIN_BACK, WITHIN_SHIFT = range(8)


@dataclass(frozen=True)
class MatrixSpec:
    """A group is `tiles` (1 or 2) times `rows` pixels, at most 16 where `unit` is "tiles", 14 where it is "dots".

    Weights are bf16 or, where `image` is of bytes, s8: then the sums are integers, and a scale for every channel makes
    numbers of them. `within`: these are rounded to such elements before the residual is added. `dynamic`: the image,
    its scale and its zero are what `codegen.dynamic` left in scratch memory.
    """

    geometry: ConvGeometry
    rows: int
    tiles: int
    bias: bool
    post: Post
    image: Element = BF16
    residual: Element = BF16
    out: Element = BF16
    unit: str = "tiles"
    within: Element | None = None
    dynamic: bool = False

    @property
    def weight(self) -> Element:
        return S8 if self.quantized else BF16

    @property
    def quantized(self) -> bool:
        return self.image.limits is not None

    @property
    def step(self) -> int:
        """Elements of K a step."""
        return ROW_BYTES // self.image.bytes

    @property
    def taps(self) -> int:
        return self.geometry.kernel[0] * self.geometry.kernel[1] * self.geometry.channels

    @property
    def steps(self) -> int:
        return -(-self.taps // self.step)

    @property
    def gathers(self) -> bool:
        crowded = self.unit == "dots" and self.group > WAYS and self.taps * self.image.bytes % WAY_BYTES == 0
        return self.geometry.width != 0 or self.geometry.channels % self.step != 0 or crowded

    @property
    def stride(self) -> int:
        """Bytes from a pixel's operands to the next one's. Gathered ones are an odd number of cache lines apart, so
        that the rows of a tile do not meet in one set of the cache."""
        return (self.steps | 1) * ROW_BYTES if self.gathers else self.taps * self.image.bytes

    @property
    def group(self) -> int:
        return self.tiles * self.rows

    @property
    def channel_blocks(self) -> int:
        return -(-self.geometry.out_channels // BLOCK)

    def pixels(self, count: int) -> int:
        """Of `count` images, or `count` itself where the geometry has width 0."""
        return count if self.geometry.width == 0 else count * self.geometry.out_height * self.geometry.out_width


@dataclass(frozen=True)
class Schedule:
    """A task has `groups` of pixels by `blocks` of 32 channels. `channels_first`: threads share out the channels
    rather than the pixels. Code does not depend on it."""

    groups: int
    blocks: int
    channels_first: bool

    def words(self, spec: MatrixSpec, count: int) -> tuple[int, ...]:
        """Groups, blocks, tasks in a row, and whether these are of one block of channels."""
        places, columns = self._sides(spec, count)
        return self.groups, self.blocks, places if self.channels_first else columns, int(self.channels_first)

    def tasks(self, spec: MatrixSpec, count: int) -> int:
        places, columns = self._sides(spec, count)
        return places * columns

    def _sides(self, spec: MatrixSpec, count: int) -> tuple[int, int]:
        groups = -(-spec.pixels(count) // spec.group)
        return -(-groups // self.groups), -(-spec.channel_blocks // self.blocks)


def pack_matrix(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kh, kw] to the order that the unit reads, filled up with zeros."""
    out = weight.shape[0]
    k = weight.permute(0, 2, 3, 1).reshape(out, -1)
    pair = 4 // weight.element_size()
    step = HALF * pair
    blocks, steps = -(-out // BLOCK), -(-k.shape[1] // step)
    padded = weight.new_zeros((blocks * BLOCK, steps * step))
    padded[:out, : k.shape[1]] = k
    return padded.view(blocks, 2, HALF, steps, HALF, pair).permute(0, 3, 1, 4, 2, 5).contiguous()


def emit_matrix(isa: Isa, spec: MatrixSpec) -> str:
    """Words: x, weights, bias, residual, out, images (or pixels of the row), the Schedule's four. Where integers stand
    for numbers, also: a scale a channel; residual's scale and shift, the output's inverse scale and zero, those of a
    rounding within and its scale and shift back, in fp32; the image's zero; where it is dynamic, sums of weights."""
    e = Emitter(isa)
    _Matrix(e, spec).tasks()
    return e.finish()


class _Matrix:
    def __init__(self, e: Emitter, spec: MatrixSpec) -> None:
        self.e, self.spec, self.g = e, spec, spec.geometry
        self.x, self.weight, self.bias = e.pointer(0, spec.image), e.pointer(1, spec.weight), e.pointer(2)
        self.residual, self.out = e.pointer(3, spec.residual), e.pointer(4, spec.out)
        count = e.word(5)
        self.pixels = count if self.g.width == 0 else e.mul(count, self.g.out_height * self.g.out_width)
        self.size, self.blocks, self.run, self.by_channels = (e.word(i) for i in range(6, 10))
        self.unit: Unit = Tiles(e, spec) if spec.unit == "tiles" else Dots(e, spec)
        self.sums = e.stack(spec.group * BLOCK, S32 if spec.quantized else FLOAT)
        lanes = ir.VectorType(spec.image.stored, spec.step)
        self.nothing = ir.Constant(lanes, None)
        if spec.quantized:
            self.scale = e.pointer(10)
            numbers = e.pointer(11)
            self.numbers = [e.splat(e.load_scalar(e.at(numbers, i))) for i in range(8)]
            one = e.b.insert_element(ir.Constant(lanes, ir.Undefined), e.b.trunc(e.word(12), I8), I32(0))
            self.nothing = e.b.shuffle_vector(
                one, ir.Constant(lanes, ir.Undefined), ir.Constant(ir.VectorType(I32, spec.step), None)
            )
        if spec.dynamic:
            scratch = e.pointer(0)
            self.x = bytes_of(e, scratch)
            self.unit_of_image, zero = numbers_of(e, scratch)
            self.zero = e.b.fptosi(zero, ir.VectorType(I32, e.isa.lanes))
            self.weight_sums = e.pointer(13, S32)
        self.panel = e.buffer(e.mul(self.size, spec.group * spec.stride), spec.image) if spec.gathers else self.x

    def tasks(self) -> None:
        e, spec = self.e, self.spec
        groups = e.b.udiv(e.add(self.pixels, spec.group - 1), e.i64(spec.group))
        by_channels = e.b.icmp_unsigned("!=", self.by_channels, e.i64(0))

        def task(t: Val) -> None:
            slow, fast = e.b.udiv(t, self.run), e.b.urem(t, self.run)
            first = e.mul(e.b.select(by_channels, fast, slow), self.size)
            block = e.mul(e.b.select(by_channels, slow, fast), self.blocks)
            self._task(first, e.min(e.add(first, self.size), groups), block)

        self.unit.begin()
        e.each(e.begin, e.end, 1, task)
        self.unit.end()

    def _task(self, first: Val, last: Val, block0: Val) -> None:
        e, spec = self.e, self.spec
        if spec.gathers:
            e.each(first, last, 1, partial(self._gather, first))
        whole, left = divmod(self.g.out_channels, BLOCK)

        def block(n: Val) -> None:
            def full() -> None:
                e.each(first, last, 1, lambda i: self._group(first, i, n, BLOCK))

            def rest() -> None:
                e.each(first, last, 1, lambda i: self._group(first, i, n, left))

            if left and whole:
                e.switch(e.b.udiv(e.i64(n), e.i64(whole)), [full, rest])
            else:
                (rest if left else full)()

        e.each(block0, e.min(e.add(block0, self.blocks), spec.channel_blocks), 1, block)

    def _start(self, group: Val) -> Val:
        return self.e.min(self.e.mul(group, self.spec.group), self.e.sub(self.pixels, self.spec.group))

    # --- operands of pixels
    def _gather(self, first: Val, group: Val) -> None:
        e, spec = self.e, self.spec
        start, row = self._start(group), spec.stride // spec.image.bytes
        home = e.at(self.panel, e.mul(e.sub(group, first), spec.group * row))
        e.each(0, spec.group, 1, lambda i: self._pixel(e.add(start, i), e.at(home, e.mul(i, row))))

    def _pixel(self, pixel: Val, home: Place) -> None:
        e, g, spec = self.e, self.g, self.spec
        padding = spec.steps * spec.step - spec.taps
        if padding:
            self._copy(None, e.at(home, spec.taps), padding)
        if g.width == 0:
            self._copy(e.at(self.x, e.mul(pixel, g.channels)), home, g.channels)
            return
        place, ox = e.divmod(pixel, g.out_width)
        image, oy = e.divmod(place, g.out_height)
        top, left = e.sub(e.mul(oy, g.strides[0]), g.pads[0]), e.sub(e.mul(ox, g.strides[1]), g.pads[1])
        across = g.kernel[1] * g.channels

        def row(r: Val) -> None:
            y = e.add(top, e.mul(r, g.dilations[0]))
            line = e.add(e.mul(e.add(e.mul(image, g.height), y), g.width), left)
            target = e.at(home, e.mul(r, across))

            def column(met: Val | None, s: int) -> None:
                inside = e.inside(e.add(left, s * g.dilations[1]), g.width)
                inside = inside if met is None else e.b.and_(met, inside)
                source = e.at(self.x, e.mul(e.add(line, s * g.dilations[1]), g.channels))
                part = e.at(target, s * g.channels)
                copy = partial(self._copy, target=part, count=g.channels)
                self._either(inside, lambda: copy(source), lambda: copy(None))

            met = e.inside(y, g.height) if g.pads[0] or g.pads[2] else None
            one_run = g.kernel[1] == 1 or g.dilations[1] == 1

            def together() -> None:
                self._copy(e.at(self.x, e.mul(line, g.channels)), target, across)

            def apart() -> None:
                for s in range(g.kernel[1]):
                    column(met, s)

            if not one_run:
                apart()
                return
            if not (g.pads[1] or g.pads[3]):
                together() if met is None else self._either(met, together, lambda: self._copy(None, target, across))
                return
            inside = e.b.and_(e.inside(left, g.width), e.inside(e.add(left, g.kernel[1] - 1), g.width))
            self._either(inside if met is None else e.b.and_(met, inside), together, apart)

        e.each(0, g.kernel[0], 1, row)

    def _either(self, condition: Val, yes: Callable[[], None], no: Callable[[], None]) -> None:
        self.e.switch(self.e.b.zext(self.e.b.not_(condition), I64), [yes, no])

    def _copy(self, source: Place | None, target: Place, count: int) -> None:
        """`count` elements, or as many zeros."""
        e, lanes = self.e, self.spec.step

        def some(at: Val, n: int | None) -> None:
            value = self.nothing if source is None else e.load_raw(e.at(source, at), lanes, n)
            e.store_raw(value, e.at(target, at), lanes, n)

        whole = count - count % lanes
        e.each(0, whole, lanes, lambda i: some(i, None))
        if whole < count:
            some(whole, count - whole)

    # --- products
    def _group(self, first: Val, group: Val, block: Val, channels: int) -> None:
        e, spec = self.e, self.spec
        halves = -(-channels // HALF)
        start = self._start(group)
        if spec.gathers:
            pixels = e.at(self.panel, e.mul(e.sub(group, first), spec.group * (spec.stride // spec.image.bytes)))
        else:
            pixels = e.at(self.x, e.mul(start, spec.taps))
        weights = e.at(self.weight, e.mul(block, spec.steps * 2 * TILE_BYTES // spec.weight.bytes))
        at = e.add(e.mul(start, self.g.out_channels), e.mul(block, BLOCK))
        self.unit.multiply(pixels, weights, self.sums, halves, self._wanted(at))
        self._leave(start, e.mul(block, BLOCK), channels)

    def _wanted(self, at: Val) -> list[Wanted]:
        """What `_leave` will touch, unless results are moved."""
        e, g = self.e, self.g
        places = [(self.out, True), *([(self.residual, False)] if self.spec.post.residual else [])]
        return [
            Wanted(e.at(place, e.add(at, line // place.element.bytes)), g.out_channels, write)
            for place, write in places
            for line in range(0, BLOCK * place.element.bytes, ROW_BYTES)
            if g.stretch is None
        ]

    def _leave(self, start: Val, lane0: Val, channels: int) -> None:
        """Bring a group's sums to the output: bias, residual, activation, store."""
        e, g, spec, lanes = self.e, self.g, self.spec, self.e.isa.lanes
        parts = [(v, min(lanes, channels - v)) for v in range(0, channels, lanes)]
        counts = {v: None if n == lanes else n for v, n in parts}
        bias = {v: e.load(e.at(self.bias, e.add(lane0, v)), n) if spec.bias else None for v, n in counts.items()}
        scale = {v: e.load(e.at(self.scale, e.add(lane0, v)), n) if spec.quantized else None for v, n in counts.items()}
        excess = {}
        if spec.dynamic:
            for v, n in counts.items():
                scale[v] = e.b.fmul(scale[v], self.unit_of_image)
                sums = e.load_raw(e.at(self.weight_sums, e.add(lane0, v)), lanes, n)
                excess[v] = e.b.mul(sums, self.zero)
        home = e.add(e.mul(start, g.out_channels), lane0)

        def row(i: Val) -> None:
            line = e.add(home, g.moved(e, e.add(start, i)))
            for v, n in counts.items():
                at = e.add(line, e.add(e.mul(i, g.out_channels), v))
                sums = e.load_raw(e.at(self.sums, e.add(e.mul(i, BLOCK), v)), lanes)
                sums = e.b.sub(sums, excess[v]) if v in excess else sums
                value = widen(e.b, sums, self.sums.element, lanes)
                if scale[v] is not None:
                    value = e.fma(value, scale[v], e.constant(0.0) if bias[v] is None else bias[v])
                elif bias[v] is not None:
                    value = e.b.fadd(value, bias[v])
                if spec.within is not None:
                    value = self._rounded(value, spec.within)
                other = e.load(e.at(self.residual, at), n) if spec.post.residual else None
                if other is not None and spec.residual.limits:
                    other = e.fma(other, self.numbers[RESIDUAL_SCALE], self.numbers[RESIDUAL_SHIFT])
                value = emit_post(e, spec.post, value, other)
                if spec.out.limits:
                    value = e.b.fmul(value, self.numbers[OUT_SCALE])
                    value = quantize(e, value, self.numbers[OUT_ZERO], spec.out.limits)
                e.store(value, e.at(self.out, at), n)

        e.each(0, spec.group, 1, row)

    def _rounded(self, value: Val, element: Element) -> Val:
        """As if it had been stored and read again."""
        assert element.limits is not None
        stored = quantize(
            self.e, self.e.b.fmul(value, self.numbers[WITHIN_SCALE]), self.numbers[WITHIN_ZERO], element.limits
        )
        return self.e.fma(stored, self.numbers[WITHIN_BACK], self.numbers[WITHIN_SHIFT])
