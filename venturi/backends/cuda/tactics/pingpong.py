"""Large products and convolutions whose epilogues hide behind the next tile's sums. See codegen/pingpong.py."""

from __future__ import annotations

from dataclasses import asdict

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.pingpong import WARPS, PingpongTile, conv_source, product_source
from venturi.backends.cuda.codegen.reader import Box, best_box
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import ConvFrame, Convolution, matched_convolution
from venturi.backends.cuda.tactics.early import ARCH, pixels_of, read_boxed, tap_step
from venturi.backends.cuda.tactics.products import Operands, Product, num_tiles

T = torch.Tensor
# Steps of 128 bytes in flight.
TILES = (
    PingpongTile(128, 128, 6), PingpongTile(64, 256, 4), PingpongTile(64, 128, 8), PingpongTile(64, 128, 8, 3),
)  # fmt: skip
NARROW = (PingpongTile(128, 64, 8), PingpongTile(128, 64, 8, 3))
LEAST_COLUMNS = 64
MAX_STAGES = 12


class PingpongProduct:
    """More tiles than multiprocessors: with fewer there is nothing to take turns with."""

    suffix = "-pingpong"

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if p.n % p.element.aligned or p.k % p.element.aligned:
            return f"N={p.n} and K={p.k} must be multiples of {p.element.aligned}"
        sizes = [t for t in (*TILES, *NARROW) if t.columns <= max(p.n, LEAST_COLUMNS)]
        found = [GemmConfig(t.rows, t.columns, p.element.step, t.stages, WARPS, 1, t.groups) for t in sizes]
        many = [c for c in found if p.rows is None or num_tiles(p.rows, p.n, c) > device.num_sms]
        return [asdict(c) for c in many] or "not more tiles than multiprocessors"

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        c = GemmConfig(**config)
        size = _tile(c)
        return product_source(region, p.tile, p.element, size, p.n, p.k, arch)

    def weights(self, weight: T, p: Product, config: Config) -> T:
        c = GemmConfig(**config)
        return shuffled(weight, p.tile, _tile(c).columns)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        c, (rows, _, k), n = GemmConfig(**config), o.sizes, o.out.shape[1]
        grid = (min(num_tiles(rows, n, c), device.num_sms),)
        kernel.launch(grid, [o.x, o.weight, o.out, *o.columns, *o.tiles, rows, n, k])


def _tile(c: GemmConfig) -> PingpongTile:
    """`waves` counts the groups of warps, of which there are at least two."""
    return PingpongTile(c.bm, c.bn, c.stages, max(2, c.waves))


PINGPONG = PingpongProduct()


class PingpongConv:
    """Convolutions over boxes of the image, more of them than multiprocessors."""

    name = "triton-conv-pingpong"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_boxed(region, self._device.arch)
        return found if isinstance(found, str) else pingpong_candidates(found[0], found[0].geometry, self._device)

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
            pointers = [pixels_of(x, g), weight, out, *frame.operands.columns, *tiles]
            kernel.launch((min(count, self._device.num_sms),), [*pointers, images, p, q, g.outputs])

        return frame.kernel(launch)


def pingpong_candidates(conv: Convolution, g: ConvGeometry, device: KernelDevice) -> list[Config] | str:
    """For `conv`, of a fixed size, that is read as `g`: more tiles than multiprocessors."""
    assert conv.size is not None
    if device.arch != ARCH:
        return "written for Hopper's warpgroup products"
    step = tap_step(g, conv.element)
    size = conv.size[0], conv.size[2], conv.size[3]
    found: list[Config] = []
    for t in (*TILES, *NARROW):
        box = best_box(size, t.rows)
        many = box.count(size) * -(-g.outputs // t.columns) > device.num_sms
        if many and t.columns <= max(g.outputs, LEAST_COLUMNS):
            stages = min(t.stages * conv.element.step // step, MAX_STAGES)
            found.append({**asdict(t), "stages": stages, "step": step, "box": list(asdict(box).values())})
    return found or "not more tiles than multiprocessors"


def read_pingpong(config: Config) -> tuple[PingpongTile, Box, int]:
    """(tile, box of the image, channels of a step)."""
    size = PingpongTile(config["rows"], config["columns"], config["stages"], config["groups"])
    return size, Box(*config["box"]), config["step"]
