"""The first layer of image networks: strided convolutions on few channels, by space to depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.dots import stored
from venturi.backends.cuda.codegen.element import FLOATS, HALF
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.pingpong import conv_source
from venturi.backends.cuda.codegen.stem import StemGeometry, block_rows, blocks_source, stem_source
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.candidates import product_candidates
from venturi.backends.cuda.tactics.conv import NHWC, Convolution, nhwc, read_convolution
from venturi.backends.cuda.tactics.early import CHANNELS
from venturi.backends.cuda.tactics.pingpong import num_programs, pingpong_candidates, read_pingpong
from venturi.backends.cuda.tactics.products import MAX_CANDIDATES, TileOperands, num_tiles, split_buffers
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.dtypes import DT
from venturi.ops.tensors import STORAGE

T = torch.Tensor
MAX_CHANNELS = 8
# One stage: loads go through the first-level cache, where overlapping rows of taps meet.
CACHED = ((128, 64, 32, 1, 4), (128, 64, 16, 1, 4), (64, 64, 64, 1, 4), (128, 32, 32, 1, 4))


def read_stem(region: RegionView, kinds: Sequence[DT] = HALF) -> tuple[Convolution, StemGeometry] | str:
    conv = read_convolution(region, kinds)
    if isinstance(conv, str):
        return conv
    g = conv.geometry
    if g.groups != 1 or conv.given_channels > MAX_CHANNELS or g.dilations != (1, 1) or g.strides == (1, 1):
        return f"not a strided convolution on at most {MAX_CHANNELS} channels"
    stem = StemGeometry(replace(g, channels=conv.given_channels), conv.given_channels)
    if stem.row % 16 or stem.width > 1024:
        return f"rows of {stem.row} taps"
    return conv, stem


def blocked_weights(stored: T, g: StemGeometry) -> T:
    """[outputs, channels, R, S] as [outputs, tap rows, tap columns, blocks of width] flattened."""
    (s, t), (r, q) = g.source.strides, g.taps
    k, c = stored.shape[:2]
    bottom = r * s - g.shift[0] - stored.shape[2]
    right = q * t - g.shift[1] - stored.shape[3]
    padded = F.pad(stored, [g.shift[1], right, g.shift[0], bottom])
    blocks = padded.reshape(k, c, r, s, q, t).permute(0, 2, 4, 3, 5, 1).reshape(k, r, q, s * t * c)
    return F.pad(blocks, [0, g.width - s * t * c]).reshape(k, -1).contiguous()


class StemConv:
    """Two kernels: blocks of the image, then a stride-1 product over rows of taps."""

    name = "triton-conv-stem"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_stem(region, FLOATS)
        if isinstance(found, str):
            return found
        conv, stem = found
        depth = stem.taps[0] * stem.row
        sms = self._device.num_sms
        wanted = product_candidates(
            conv.rows, stem.source.outputs, depth, sms, 4 * MAX_CANDIDATES, splits=True, element=conv.element
        )
        fits = [c for c in wanted if stem.row % c.bk == 0]
        if not fits:
            fits = [GemmConfig(bm, bn, conv.element.depth, 4, 4) for bm, bn in ((128, 32), (64, 32), (128, 64))]
            fits = [c for c in fits if stem.row % c.bk == 0]
        cached = [GemmConfig(*c) for c in CACHED if c[1] <= max(16, stem.source.outputs)]
        cached = [c for c in cached if stem.row % c.bk == 0 and c.bk >= conv.element.depth]
        return [asdict(c) for c in (*fits[:MAX_CANDIDATES], *cached)] or f"rows of {stem.row} taps"

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        found = read_stem(region, FLOATS)
        assert not isinstance(found, str)
        (conv, stem), arch = found, self._device.arch
        product = stem_source(region, conv.tile, stem, conv.element, GemmConfig(**config), arch)
        return [blocks_source(region, stem, conv.dtype, arch, conv.fill), product]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_stem(region, FLOATS)
        assert not isinstance(found, str)
        (conv, stem), c = found, GemmConfig(**config)

        def launch(
            product: Launchable, packed: T, weight: T, out: T, extra: list[T], pixels: tuple[int, int, int]
        ) -> None:
            rows, n = math.prod(pixels), stem.source.outputs
            count = num_tiles(rows, n, c)
            work, locks = split_buffers(out, c.split, rows * n, count)
            product.launch((count, c.split), [packed, weight, out, *extra, work, locks, *pixels, n])

        order = partial(stored, element=conv.element)
        return two_kernels(region, self._device, self.sources(region, config), launch, order)


class StemPingpong:
    """Two kernels: blocks of the image, then a convolution by warpgroups in turns whose pixels are rows of taps.

    Rows of neighbouring pixels overlap in memory, which the tensor memory accelerator does not mind.
    """

    name = "triton-conv-stem-pingpong"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_stem(region)
        if isinstance(found, str):
            return found
        conv, stem = found
        if conv.dtype in HALF and stem.has_empty_taps:
            return "a NaN where no tap reads would reach the sums"
        g, aligned = stem.by_rows, conv.element.aligned
        if conv.size is None or g.channels % CHANNELS or stem.width % aligned or g.outputs % aligned:
            return f"sizes that are not fixed, or rows of {stem.row} taps"
        return pingpong_candidates(conv, g, replace(conv.tile, tiles=()), self._device)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        found = read_stem(region)
        assert not isinstance(found, str)
        (conv, stem), arch = found, self._device.arch
        size, box, step = read_pingpong(config)
        product = conv_source(region, conv.tile, conv.element, size, stem.by_rows, box, step, arch)
        return [blocks_source(region, stem, conv.dtype, arch, conv.fill), product]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_stem(region)
        assert not isinstance(found, str)
        (conv, stem), (size, box, _) = found, read_pingpong(config)

        def launch(
            product: Launchable, packed: T, weight: T, out: T, extra: list[T], pixels: tuple[int, int, int]
        ) -> None:
            images, p, q = pixels
            bp, bq = p + stem.taps[0] - 1, q + stem.taps[1] - 1
            strides = (bp * bq * stem.width, bq * stem.width, stem.width, 1)
            rows = packed.as_strided((images, bp, q, stem.row), strides)
            count = box.count(pixels) * -(-stem.source.outputs // size.columns)
            sizes, n = [*pixels, stem.source.outputs], stem.source.outputs
            programs = num_programs(size, count, n, self._device.num_sms)
            product.launch((programs,), [rows, weight, out, *extra, *sizes])

        order = partial(shuffled, tile=conv.tile, columns=size.columns)
        return two_kernels(region, self._device, self.sources(region, config), launch, order)


def two_kernels(
    region: RegionView,
    device: KernelDevice,
    sources: list[KernelSource],
    launch: Callable[[Launchable, T, T, T, list[T], tuple[int, int, int]], None],
    order: Callable[[T], T] = lambda weight: weight,
) -> Kernel:
    """`launch(product, blocks, weight, out, columns and tiles, [images, P, Q])` after the blocks are there."""
    found = read_stem(region, FLOATS)
    assert not isinstance(found, str)
    conv, stem = found
    blocks, product, size = device.kernel(sources[0]), device.kernel(sources[1]), block_rows(sources[0])
    weight = order(blocked_weights(region.constant(conv.weight), stem))
    operands, fallback = TileOperands(region, conv.tile), DeviceReference().bind(region, {}).run
    dtype, g = STORAGE[conv.tile.output.dtype], stem.source  # type: ignore[index]

    def run(*args: Any) -> Any:
        x: T = args[conv.first]
        images, _, height, width = x.shape
        p, q = g.output_size(height, width)
        if not x.numel() or p <= 0 or q <= 0 or images * p * q >= 2**31 or x.numel() >= 2**31:
            return fallback(*args)
        bp, bq = p + stem.taps[0] - 1, q + stem.taps[1] - 1
        packed = torch.empty(images * bp * bq * stem.width, dtype=x.dtype, device=x.device)
        blocks.launch((images * bp, -(-bq // size)), [x, packed, height, width, bp, bq, *x.stride()])
        out = torch.empty((images, g.outputs, p, q), dtype=dtype, device=x.device, memory_format=NHWC)
        extra = [*operands.columns, *(nhwc(t) for t in operands.tiles(args))]
        launch(product, packed, weight, out, extra, (images, p, q))
        return out

    return Kernel(run)
