"""Large products whose epilogues hide behind the next tile's sums. See codegen/pingpong.py."""

from __future__ import annotations

from dataclasses import asdict

from venturi.backends.base import Config, RegionView
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.pingpong import WARPS, pingpong_source
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.early import ARCH
from venturi.backends.cuda.tactics.products import Operands, Product, num_tiles

# Rows and columns of a tile, steps of 64 in flight.
TILES = ((128, 128, 6), (64, 256, 4), (64, 128, 8))


class PingpongProduct:
    """More tiles than multiprocessors: with fewer there is nothing to take turns with."""

    suffix = "-pingpong"

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if p.n % 8 or p.k % 8:
            return f"N={p.n} and K={p.k} must be multiples of 8"
        found = [GemmConfig(bm, bn, 64, stages, WARPS) for bm, bn, stages in TILES if bn <= p.n]
        many = [c for c in found if p.rows is None or num_tiles(p.rows, p.n, c) > device.num_sms]
        if not found:
            return f"{p.n} columns"
        return [asdict(c) for c in many] or "not more tiles than multiprocessors"

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return pingpong_source(region, p.tile, p.dtype, GemmConfig(**config), p.n, arch)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        c, (rows, n, k) = GemmConfig(**config), o.sizes
        grid = (min(num_tiles(rows, n, c), device.num_sms),)
        kernel.launch(grid, [o.x, o.weight, o.out, *o.columns, *o.tiles, rows, n, k])


PINGPONG = PingpongProduct()
