"""The first layer of image networks where it is large: lines of blocks are read once. See codegen/strips.py."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.stem import blocks_source
from venturi.backends.cuda.codegen.strips import Strip, strips_source
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.early import ALL_SHARED, ARCH
from venturi.backends.cuda.tactics.stem import read_stem, two_kernels

T = torch.Tensor
# A row of taps is one row of the hardware's swizzle.
ROW_BYTES = (32, 64, 128)
COLUMNS = (32, 64, 128)
SHAPES = ((16, 2), (16, 3), (8, 3), (8, 2))
MAX_STAGES = 12
_BARRIERS = 1024


class StemStrips:
    name = "triton-conv-stem-strips"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_stem(region)
        if isinstance(found, str):
            return found
        conv, stem = found
        row_bytes, n = stem.row * conv.element.bytes, stem.source.outputs
        columns = next((c for c in COLUMNS if c >= n), 0)
        if self._device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if row_bytes not in ROW_BYTES or not columns or n % conv.element.aligned or conv.size is None:
            return f"{n} outputs, rows of {row_bytes} bytes of taps, or sizes that are not fixed"
        candidates: list[Config] = []
        for height, groups in SHAPES:
            one = Strip(height, columns, 1, groups).shared_bytes(stem.taps[0], row_bytes)
            weights = stem.taps[0] * columns * row_bytes
            stages = min((ALL_SHARED - _BARRIERS - weights) // (one - weights), MAX_STAGES)
            strip = Strip(height, columns, stages, groups)
            tiles = strip.count((conv.size[0], conv.size[2], conv.size[3]))
            if stages >= groups and tiles > self._device.num_sms:
                candidates.append(asdict(strip))
        return candidates or "not more tiles than multiprocessors"

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        found = read_stem(region)
        assert not isinstance(found, str)
        (conv, stem), arch = found, self._device.arch
        product = strips_source(region, conv.tile, conv.element, Strip(**config), stem, arch)
        return [blocks_source(region, stem, conv.dtype, arch, conv.fill), product]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_stem(region)
        assert not isinstance(found, str)
        (conv, stem), strip = found, Strip(**config)

        def launch(
            product: Launchable, packed: T, weight: T, out: T, extra: list[T], pixels: tuple[int, int, int]
        ) -> None:
            images, p, q = pixels
            bp, bq = p + stem.taps[0] - 1, q + stem.taps[1] - 1
            strides = (bp * bq * stem.width, bq * stem.width, stem.width, 1)
            rows = packed.as_strided((images, bp, q, stem.row), strides)
            grid = (min(strip.count(pixels), self._device.num_sms),)
            product.launch(grid, [rows, weight, out, *extra, *pixels, stem.source.outputs])

        order = partial(shuffled, tile=conv.tile, columns=strip.columns)
        return two_kernels(region, self._device, self.sources(region, config), launch, order)
