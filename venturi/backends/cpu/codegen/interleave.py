"""From planes to pixels: NCHW to NHWC for images of few channels, by shuffles of whole vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from venturi.backends.cpu.codegen.element import FLOAT, Element
from venturi.backends.cpu.codegen.emit import I32, Emitter, Val
from venturi.backends.cpu.codegen.isa import Isa

MOST_CHANNELS = 4
VECTORS = 32  # of each plane, a task


@dataclass(frozen=True)
class InterleaveSpec:
    """Images of `channels` planes of `pixels` numbers. A task is VECTORS vectors of pixels of an image."""

    channels: int
    pixels: int
    element: Element = FLOAT

    def lanes(self, isa: Isa) -> int:
        return isa.lanes * 4 // self.element.bytes

    def tasks(self, isa: Isa) -> int:
        """Of an image."""
        return -(-self.pixels // (self.lanes(isa) * VECTORS))


def emit_interleave(isa: Isa, spec: InterleaveSpec) -> str:
    """Words: x, out. Tasks: images times `spec.tasks`. Numbers are moved as they are stored."""
    e = Emitter(isa)
    x, out, lanes = e.pointer(0, spec.element), e.pointer(1, spec.element), spec.lanes(isa)
    whole, left = divmod(spec.pixels, lanes)

    def vector(image: Val, pixel: Val, count: int) -> None:
        """`count` pixels from `pixel` on, at most a vector."""
        planes = [
            e.load_raw(e.at(x, e.add(e.mul(e.add(e.mul(image, spec.channels), c), spec.pixels), pixel)), lanes, count)
            for c in range(spec.channels)
        ]
        target = e.at(out, e.mul(e.add(e.mul(image, spec.pixels), pixel), spec.channels))
        for j in range(-(-count * spec.channels // lanes)):
            filled = min(lanes, count * spec.channels - j * lanes)
            e.store_raw(_interleaved(e, planes, j, lanes), e.at(target, j * lanes), lanes, filled)

    def task(t: Val) -> None:
        image, part = e.divmod(t, spec.tasks(isa))
        first = e.mul(part, VECTORS)
        last = e.min(e.add(first, VECTORS), whole)
        e.each(first, last, 1, lambda v: vector(image, e.mul(v, lanes), lanes))
        if left:
            is_last = e.b.icmp_unsigned("==", e.i64(part), e.i64(spec.tasks(isa) - 1))
            e.when(is_last, partial(vector, image, whole * lanes, left))

    e.each(e.begin, e.end, 1, task)
    return e.finish()


def _interleaved(e: Emitter, planes: list[Val], j: int, lanes: int) -> Val:
    """Vector `j` of those that hold the planes' vectors side by side, pixel by pixel."""
    places = [divmod(j * lanes + i, len(planes)) for i in range(lanes)]  # of each lane: pixel, channel
    found = planes[0]
    for channel in range(1, len(planes)):
        order = [
            lanes + pixel if c == channel else pixel if channel == 1 and c == 0 else i
            for i, (pixel, c) in enumerate(places)
        ]
        found = e.b.shuffle_vector(found, planes[channel], ir.Constant(ir.VectorType(I32, lanes), order))
    return found
