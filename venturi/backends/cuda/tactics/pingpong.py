"""Large products and convolutions whose epilogues hide behind the next tile's sums. See codegen/pingpong.py."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.element import HALF, Element
from venturi.backends.cuda.codegen.pingpong import MOST_ACROSS, PingpongTile, conv_source, product_source
from venturi.backends.cuda.codegen.reader import Box, best_box
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import ConvFrame, Convolution, matched_convolution
from venturi.backends.cuda.tactics.early import ARCH, pixels_of, read_boxed, tap_step
from venturi.backends.cuda.tactics.products import Operands, Product, misaligned
from venturi.ir.dtypes import DT

T = torch.Tensor
# Steps of 128 bytes in flight.
TILES = (
    PingpongTile(128, 128, 6), PingpongTile(64, 256, 4), PingpongTile(64, 128, 8), PingpongTile(64, 128, 8, 3),
)  # fmt: skip
NARROW = (PingpongTile(128, 64, 8), PingpongTile(128, 64, 8, 3))
LEAST_COLUMNS = 64
MAX_STAGES, LEAST_STAGES = 12, 3
# Bytes of shared memory for everything, and what residuals should have of it; more than 8 are not needed.
_SHARED, _RESIDUALS, _MOST_AHEAD = 216 * 1024, 64 * 1024, 8


def variants(t: PingpongTile, tile: TileBody, element: Element, n: int, step: int, count: int) -> list[PingpongTile]:
    """`t`, for bytes with its residual requested ahead; and the same with weights that stay, of `count` steps of `step`
    elements, and the residual ahead. Where there is one that the memory accelerator can read, and where they fit."""
    row, left, ahead = step * element.bytes, _SHARED, 0
    residual = tile.tiles[0].dtype if len(tile.tiles) == 1 else None
    if residual in (*HALF, DT.INT8) and n * Element(residual).bytes % 16 == 0:
        size = t.rows * t.columns * Element(residual).bytes
        ahead = max(t.groups + 1, min(_MOST_AHEAD, _RESIDUALS // size))
        left -= ahead * size
    stages = min(t.stages, left // ((t.rows + t.columns) * row))
    requested = ahead and element.bytes == 1 and stages >= LEAST_STAGES
    found = [replace(t, ahead=ahead, stages=stages) if requested else t]
    stages = min(MAX_STAGES, (left - count * t.columns * row) // (t.rows * row))
    if stages >= LEAST_STAGES and -(-n // t.columns) <= MOST_ACROSS:
        found.append(replace(t, ahead=ahead, stages=stages, stays=True))
    return found


def num_programs(t: PingpongTile, tiles: int, n: int, num_sms: int) -> int:
    """One a multiprocessor, if there are as many tiles."""
    across = -(-n // t.columns)
    return min(tiles, num_sms // across * across if t.stays else num_sms)


class PingpongProduct:
    """More tiles than multiprocessors: with fewer there is nothing to take turns with."""

    suffix = "-pingpong"
    kinds: tuple[DT, ...] = (*HALF, DT.INT8)

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if obstacle := misaligned(p):
            return obstacle
        step = p.element.step
        sizes = [t for t in (*TILES, *NARROW) if t.columns <= max(p.n, LEAST_COLUMNS)]
        many = [t for t in sizes if p.rows is None or _num_tiles(p.rows, p.n, t) > device.num_sms]
        found = [v for t in many for v in variants(t, p.tile, p.element, p.n, step, -(-p.k // step))]
        return [asdict(t) for t in found] or "not more tiles than multiprocessors"

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return product_source(region, p.tile, p.element, PingpongTile(**config), p.n, p.k, arch)

    def weights(self, weight: T, p: Product, config: Config) -> T:
        return shuffled(weight, p.tile, PingpongTile(**config).columns)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        t, (rows, _, k), n = PingpongTile(**config), o.sizes, o.out.shape[1]
        skip, tiles = (o.tiles, []) if t.ahead else ([], o.tiles)
        grid = (num_programs(t, _num_tiles(rows, n, t), n, device.num_sms),)
        kernel.launch(grid, [o.x, o.weight, *skip, o.out, *o.columns, *tiles, rows, n, k])


def _num_tiles(rows: int, n: int, t: PingpongTile) -> int:
    return -(-rows // t.rows) * -(-n // t.columns)


PINGPONG = PingpongProduct()


class PingpongConv:
    """Convolutions over boxes of the image, more of them than multiprocessors."""

    name = "triton-conv-pingpong"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_boxed(region, self._device.arch)
        if isinstance(found, str):
            return found
        return pingpong_candidates(found[0], found[0].geometry, found[0].tile, self._device)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv, (size, box, step) = matched_convolution(region), read_pingpong(config)
        return [conv_source(region, conv.tile, conv.element, size, conv.geometry, box, step, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv, (size, box, _) = matched_convolution(region), read_pingpong(config)
        g, frame = conv.geometry, ConvFrame(region, conv, self._device)
        kernel = self._device.kernel(self.sources(region, config)[0])
        weight = shuffled(conv.packed(region), conv.tile, size.columns)

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            images, _, _, p, q = sizes
            count = box.count((images, p, q)) * -(-g.outputs // size.columns)
            skip, rest = ([t.permute(0, 2, 3, 1) for t in tiles], []) if size.ahead else ([], tiles)
            pointers = [pixels_of(x, g), weight, *skip, out, *frame.operands.columns, *rest]
            programs = num_programs(size, count, g.outputs, self._device.num_sms)
            kernel.launch((programs,), [*pointers, images, p, q, g.outputs])

        return frame.kernel(launch)


def pingpong_candidates(
    conv: Convolution, g: ConvGeometry, tile: TileBody, device: KernelDevice, more: int = 0
) -> list[Config] | str:
    """For `conv`, of a fixed size, that is read as `g` and, after its own, `more` steps; `tile` is the epilogue. More
    tiles than multiprocessors."""
    assert conv.size is not None
    if device.arch != ARCH:
        return "written for Hopper's warpgroup products"
    step = tap_step(g, conv.element)
    count = g.kernel[0] * g.kernel[1] * g.channels // step + more
    size = conv.size[0], conv.size[2], conv.size[3]
    found: list[Config] = []
    for t in (*TILES, *NARROW):
        box = best_box(size, t.rows)
        many = box.count(size) * -(-g.outputs // t.columns) > device.num_sms
        if many and t.columns <= max(g.outputs, LEAST_COLUMNS):
            fitted = replace(t, stages=min(t.stages * conv.element.step // step, MAX_STAGES))
            for v in variants(fitted, tile, conv.element, g.outputs, step, count):
                found.append({**asdict(v), "step": step, "box": list(asdict(box).values())})
    return found or "not more tiles than multiprocessors"


def read_pingpong(config: Config) -> tuple[PingpongTile, Box, int]:
    """(tile, box of the image, channels of a step)."""
    size = PingpongTile(**{k: v for k, v in config.items() if k not in ("box", "step")})
    return size, Box(*config["box"]), config["step"]
