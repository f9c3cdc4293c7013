"""The index arithmetic of a convolution in NHWC, with every size known."""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.cpu.codegen.emit import Emitter, Val


@dataclass(frozen=True)
class Stretch:
    """Where results of one row of pixels lie, in pixels: rows of `width` of them, each the one of number `first` among
    `times`."""

    width: int
    times: int
    first: int

    def beyond(self, e: Emitter, pixel: Val) -> Val:
        """How much further than `pixel` its result lies."""
        row, _ = e.divmod(pixel, self.width)
        return e.mul(e.add(e.mul(row, self.times - 1), self.first), self.width)


@dataclass(frozen=True)
class ConvGeometry:
    """One image of `height` x `width` x `channels` to `out_channels`. `pads` are top, left, bottom, right.

    Width 0 stands for one row of pixels whose length is known when the code runs: pointwise convolutions, products.
    Only results of these may be stretched.
    """

    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    stretch: Stretch | None = None

    @property
    def out_height(self) -> int:
        return self._out(self.height, 0)

    @property
    def out_width(self) -> int:
        return self._out(self.width, 1)

    def _out(self, size: int, axis: int) -> int:
        reach = self.dilations[axis] * (self.kernel[axis] - 1) + 1
        return (size + self.pads[axis] + self.pads[axis + 2] - reach) // self.strides[axis] + 1

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads)

    def flat(self) -> ConvGeometry:
        """A pointwise convolution as one row of pixels of any length."""
        plain = ConvGeometry(1, 0, self.channels, self.out_channels, stretch=self.stretch)
        return plain if self.is_pointwise else self

    def moved(self, e: Emitter, pixel: Val) -> Val:
        """Elements of the output between where the result of `pixel` would lie and where it lies."""
        return 0 if self.stretch is None else e.mul(self.stretch.beyond(e, pixel), self.out_channels)

    def valid(self, tap: int, out_x: int) -> bool:
        """Whether column `tap` of the kernel meets the image at output column `out_x`."""
        return 0 <= self.column(tap, out_x) < self.width

    def valid_rows(self, start: int, rows: int) -> tuple[tuple[int, ...], ...]:
        """For each kernel column, which of `rows` output pixels from column `start` on meet the image there."""
        taps = range(self.kernel[1])
        return tuple(tuple(r for r in range(rows) if self.valid(tap, start + r)) for tap in taps)

    def column(self, tap: int, out_x: int) -> int:
        return out_x * self.strides[1] - self.pads[1] + tap * self.dilations[1]


def tile_starts(size: int, tile: int) -> list[int]:
    """First positions of tiles that cover [0, size); the last one overlaps its neighbour rather than stick out.

    >>> tile_starts(17, 7)
    [0, 7, 10]
    """
    return [min(i, size - tile) for i in range(0, size, tile)]


def kernel_rows(e: Emitter, g: ConvGeometry, top: Val) -> tuple[Val, Val]:
    """The rows [first, last) of the kernel that meet the image when its first row lies at `top`."""
    if not (g.pads[0] or g.pads[2]):
        return 0, g.kernel[0]
    d = g.dilations[0]
    first = e.b.sdiv(e.i64(e.max(e.sub(d - 1, top), 0)), e.i64(d))
    last = e.min(e.b.sdiv(e.i64(e.max(e.add(e.sub(g.height, top), d - 1), 0)), e.i64(d)), g.kernel[0])
    return first, last
