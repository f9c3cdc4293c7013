"""Pooling in NHWC: every lane is a channel; windows are cut to the part that meets the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.element import FLOAT, Element
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.geometry import ConvGeometry, kernel_rows
from venturi.backends.cpu.codegen.isa import Isa


@dataclass(frozen=True)
class PoolSpec:
    """`kind` is "max" or "mean". A mean divides by the part of the window inside the image, by all of it with
    `whole_window`. A task is one row of output pixels."""

    geometry: ConvGeometry
    kind: str
    whole_window: bool = False
    element: Element = FLOAT


def emit_pool(isa: Isa, spec: PoolSpec) -> str:
    """Words: x, out. Tasks: images times output rows."""
    e = Emitter(isa)
    kernel = _Pool(e, spec)
    e.each(e.begin, e.end, 1, kernel.line)
    return e.finish()


class _Pool:
    def __init__(self, e: Emitter, spec: PoolSpec) -> None:
        self.e, self.spec, self.g = e, spec, spec.geometry
        self.x, self.out = e.pointer(0, spec.element), e.pointer(1, spec.element)

    def line(self, t: Val) -> None:
        e, g = self.e, self.g
        image, y = e.divmod(t, g.out_height)
        top = e.sub(e.mul(y, g.strides[0]), g.pads[0])
        rows = kernel_rows(e, g, top)
        across = ConvGeometry(
            g.width, g.width, g.channels, g.channels, (g.kernel[1], 1), (g.strides[1], 1),
            (g.pads[1], 0, g.pads[3], 0), (g.dilations[1], 1),
        )  # fmt: skip

        def pixel(ox: Val) -> None:
            left = e.sub(e.mul(ox, g.strides[1]), g.pads[1])
            columns = kernel_rows(e, across, left)
            source = e.add(e.mul(e.add(e.mul(image, g.height), top), g.width), left)
            target = e.mul(e.add(e.mul(t, g.out_width), ox), g.channels)
            whole = g.channels - g.channels % e.isa.lanes
            window = partial(self._window, source, target, rows, columns)
            e.each(0, whole, e.isa.lanes, lambda c: window(c, None))
            if whole < g.channels:
                window(whole, g.channels - whole)

        e.each(0, g.out_width, 1, pixel)

    def _window(
        self, source: Val, target: Val, rows: tuple[Val, Val], columns: tuple[Val, Val], c: Val, count: int | None
    ) -> None:
        e, g = self.e, self.g
        is_max = self.spec.kind == "max"

        def row(r: Val, acc: list[Val]) -> list[Val]:
            def column(s: Val, acc: list[Val]) -> list[Val]:
                pixel = e.add(source, e.add(e.mul(r, g.dilations[0] * g.width), e.mul(s, g.dilations[1])))
                x = e.load(e.at(self.x, e.add(e.mul(pixel, g.channels), c)), count)
                return [m.maximum(e, acc[0], x) if is_max else e.b.fadd(acc[0], x)]

            return e.loop(columns[0], columns[1], 1, acc, column)

        start = e.constant(-float("inf") if is_max else 0.0)
        total = e.loop(rows[0], rows[1], 1, [start], row)[0]
        if not is_max:
            size: Val = g.kernel[0] * g.kernel[1]
            if not self.spec.whole_window:
                size = e.mul(e.sub(rows[1], rows[0]), e.sub(columns[1], columns[0]))
            total = e.b.fdiv(total, e.splat(e.to_float(size)))
        e.store(total, e.at(self.out, e.add(target, c)), count)


def emit_global_mean(isa: Isa, pixels: int, channels: int, element: Element = FLOAT) -> str:
    """Words: x, out. Tasks: images times vectors of channels. Four sums run side by side."""
    e = Emitter(isa)
    x, out, lanes = e.pointer(0, element), e.pointer(1, element), isa.lanes
    vectors = -(-channels // lanes)

    def block(image: Val, c: Val, count: int | None) -> None:
        source = e.at(x, e.add(e.mul(image, pixels * channels), c))
        whole = pixels - pixels % 4

        def four(p: Val, acc: list[Val]) -> list[Val]:
            at = e.at(source, e.mul(p, channels))
            return [e.b.fadd(acc[i], e.load(e.at(at, i * channels), count)) for i in range(4)]

        acc = e.loop(0, whole, 4, [e.constant(0.0)] * 4, four)
        for i in range(pixels - whole):
            acc = [e.b.fadd(acc[0], e.load(e.at(source, (whole + i) * channels), count)), *acc[1:]]
        total = e.b.fadd(e.b.fadd(acc[0], acc[1]), e.b.fadd(acc[2], acc[3]))
        mean = e.b.fmul(total, e.constant(1.0 / pixels))
        e.store(mean, e.at(out, e.add(e.mul(image, channels), c)), count)

    def task(t: Val) -> None:
        image, v = e.divmod(t, vectors)
        c, left = e.mul(v, lanes), channels % lanes
        cases: list[Callable[[], None]] = [lambda: block(image, c, None)]
        if left:
            last = partial(block, image, c, left)
            cases = [cases[0], last] if vectors > 1 else [last]
        e.switch(e.b.udiv(e.i64(v), e.i64(max(1, vectors - 1))) if left else 0, cases)

    e.each(e.begin, e.end, 1, task)
    return e.finish()
