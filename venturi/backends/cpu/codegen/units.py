"""What multiplies a group of pixels by a block of channels: tiles of a matrix unit (Intel AMX), or vector registers.

Both read the same operands: pixels a constant stride apart, weights as `pack_matrix` lays them, in steps of 64 bytes of
K. Both leave their sums in memory as [pixel][32 channels].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llvmlite import ir

from venturi.backends.cpu.codegen.element import BF16, I8, S8, U8, Element, Place, bfloats
from venturi.backends.cpu.codegen.emit import I32, I64, PTR, Emitter, Val

ROW_BYTES, TILE_BYTES, HALF, BLOCK = 64, 1024, 16, 32
GROUPS = ROW_BYTES // 4
_PRODUCT = {BF16: "tdpbf16ps", U8: "tdpbusd", S8: "tdpbssd"}
_SUMS, _PIXELS, _WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)
_TOGETHER = 4
# Weights are asked for so many bytes before they are used: they come from memory when a network has more of them than
# caches hold. 4096 was best of 2048 to 16384 (Zen 5, cold 3x3 layers of 512 channels: 486 us without, 327 with).
_AHEAD = 4096


class Shape(Protocol):
    """What a unit needs to know of a MatrixSpec: a group is `tiles` times `rows` pixels, `stride` bytes apart, of
    `image` elements in `steps` steps of `step`."""

    @property
    def rows(self) -> int: ...
    @property
    def tiles(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def gathers(self) -> bool: ...
    @property
    def image(self) -> Element: ...
    @property
    def weight(self) -> Element: ...


@dataclass(frozen=True)
class Wanted:
    """Cache lines that will be read or, with `write`, written once a group is multiplied: that of the first pixel, the
    next one's `stride` elements on."""

    first: Place
    stride: int
    write: bool


class Unit(Protocol):
    def begin(self) -> None:
        """Where the kernel begins."""

    def end(self) -> None:
        """Where it ends."""

    def multiply(self, pixels: Place, weights: Place, sums: Place, halves: int, wanted: Sequence[Wanted]) -> None:
        """The products of a group and the first `halves` times 16 channels of a block."""


class Tiles:
    """Four tiles hold the sums of up to 32 pixels by 32 channels; two of pixels and two of weights feed them."""

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape

    def begin(self) -> None:
        """Palette 1: bytes a row (16-bit) of tile t at 16 + 2t, rows (8-bit) at 48 + t."""
        rows = [self.shape.rows if t in (*_SUMS, *_PIXELS) else HALF for t in range(8)]
        layout = [1, *[0] * 15, *([ROW_BYTES, 0] * 8), *[0] * 16, *rows, *[0] * 8]
        place = self.e.stack(ROW_BYTES // 4)
        self.e.b.store(ir.Constant(ir.VectorType(I8, 64), layout), place.address, align=64)
        self.e.b.call(self._do("ldtilecfg", PTR), [place.address])

    def end(self) -> None:
        self.e.b.call(self._do("tilerelease"), [])

    def multiply(self, pixels: Place, weights: Place, sums: Place, halves: int, wanted: Sequence[Wanted]) -> None:
        e, shape = self.e, self.shape
        used = [(i, j) for i in range(shape.tiles) for j in range(halves)]
        for i, j in used:
            e.b.call(self._do("tilezero", I8), [I8(_SUMS[2 * i + j])])
        e.each(0, shape.steps, 1, lambda k: self._step(pixels, weights, k, halves))
        for i, j in used:
            place = e.at(sums, i * shape.rows * BLOCK + j * HALF)
            self._move("tilestored64", _SUMS[2 * i + j], place, BLOCK * 4)

    def _step(self, pixels: Place, weights: Place, k: Val, halves: int) -> None:
        e, shape = self.e, self.shape
        size = shape.image.bytes
        for j in range(halves):
            at = e.add(e.mul(k, 2 * TILE_BYTES // size), j * TILE_BYTES // size)
            self._move("tileloadd64", _WEIGHTS[j], e.at(weights, at), ROW_BYTES)
        for i in range(shape.tiles):
            at = e.add(e.mul(k, shape.step), i * shape.rows * (shape.stride // size))
            self._move("tileloadd64", _PIXELS[i], e.at(pixels, at), shape.stride)
            for j in range(halves):
                tiles = (_SUMS[2 * i + j], _PIXELS[i], _WEIGHTS[j])
                e.b.call(self._do(_PRODUCT[shape.image], I8, I8, I8), [I8(t) for t in tiles])

    def _move(self, name: str, tile: int, place: Place, stride: int) -> None:
        self.e.b.call(self._do(name, I8, PTR, I64), [I8(tile), place.address, I64(stride)])

    def _do(self, name: str, *types: ir.Type) -> Val:
        return self.e.intrinsic(f"llvm.x86.{name}", ir.VoidType(), types)


class Dots:
    """A register of sums for each pixel and 16 channels; an instruction adds the products of two bf16 or four bytes to
    each of 16 sums. Bytes of pixels must be unsigned there: signed ones are read with 128 added, which the caller
    makes up for."""

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape
        self.words = ir.VectorType(I32, e.isa.lanes)
        real = shape.image is BF16
        self.kind = e.vector if real else self.words
        name = "avx512bf16.dpbf16ps.512" if real else "avx512.vpdpbusd.512"
        operand = bfloats(2 * e.isa.lanes) if real else self.words
        self.operand = operand
        self.product = e.intrinsic(f"llvm.x86.{name}", self.kind, [self.kind, operand, operand])

    def begin(self) -> None:
        assert self.e.isa.lanes == HALF, "written for registers of 16 sums"

    def end(self) -> None:
        pass

    def multiply(self, pixels: Place, weights: Place, sums: Place, halves: int, wanted: Sequence[Wanted]) -> None:
        e, rows = self.e, self.shape.rows * self.shape.tiles
        size = self.shape.image.bytes

        pieces = self.shape.steps * (GROUPS // _TOGETHER)
        each = -(-rows // pieces)
        asking = -(-rows // each)
        asking = asking if 2 * asking < pieces else pieces

        def some(k: Val, acc: list[Val], wanted: Sequence[Wanted] = ()) -> list[Val]:
            """Groups 4k to 4k + 4 of K."""
            step, part = e.divmod(k, GROUPS // _TOGETHER)
            here = e.at(pixels, e.mul(k, 4 * _TOGETHER // size))
            at = e.add(e.mul(step, 2 * TILE_BYTES // size), e.mul(part, _TOGETHER * ROW_BYTES // size))
            block, acc = e.at(weights, at), list(acc)
            for j in range(halves):
                for g in range(_TOGETHER):
                    e.prefetch(e.at(block, (_AHEAD + j * TILE_BYTES + g * ROW_BYTES) // size))
            self._ask(pixels, k, each, wanted)
            for g in range(_TOGETHER):
                columns = [
                    self._load(e.at(block, (j * TILE_BYTES + g * ROW_BYTES) // size), ROW_BYTES) for j in range(halves)
                ]
                for i in range(rows):
                    pixel = self._broadcast(e.at(here, (i * self.shape.stride + 4 * g) // size))
                    for j, column in enumerate(columns):
                        acc[i * halves + j] = e.b.call(self.product, [acc[i * halves + j], pixel, column])
            return acc

        zeros = [ir.Constant(self.kind, None)] * (rows * halves)
        acc = e.loop(0, asking, 1, zeros, lambda k, acc: some(k, acc, wanted))
        acc = e.loop(asking, pieces, 1, acc, some) if asking < pieces else acc
        for i in range(rows):
            for j in range(halves):
                e.b.store(acc[i * halves + j], e.at(sums, i * BLOCK + j * HALF).address, align=64)

    def _ask(self, pixels: Place, k: Val, each: int, wanted: Sequence[Wanted]) -> None:
        """Spread over the groups of K, so that no burst keeps loads waiting: the next group's pixels where they come
        straight from the image, and what is wanted after this group. ResNet-50, batch 8, Zen 4: 171 ms without, 162
        with; wanted lines all at once: 175."""
        e, shape = self.e, self.shape
        rows, size = shape.rows * shape.tiles, shape.image.bytes
        if not shape.gathers:
            step, part = e.divmod(k, GROUPS // _TOGETHER)
            at = e.add(e.mul(step, ROW_BYTES // size), e.mul(part, _TOGETHER * shape.stride // size))
            for i in range(_TOGETHER):
                e.prefetch(e.at(pixels, e.add(at, (rows + i) * shape.stride // size)))
        for lines in wanted:
            for i in range(each):
                at = e.mul(e.add(e.mul(k, each), i), lines.stride)
                e.prefetch(e.at(lines.first, at), write=lines.write)

    def _load(self, place: Place, align: int) -> Val:
        return self.e.b.load(place.address, typ=self.operand, align=align)

    def _broadcast(self, place: Place) -> Val:
        b = self.e.b
        one = b.load(place.address, typ=I32, align=self.shape.image.bytes)
        undefined = ir.Constant(self.words, ir.Undefined)
        vector = b.shuffle_vector(b.insert_element(undefined, one, I32(0)), undefined, ir.Constant(self.words, None))
        if self.shape.image is S8:
            vector = b.xor(vector, ir.Constant(self.words, [-0x7F7F7F80] * self.e.isa.lanes))
        return b.bitcast(vector, self.operand)
