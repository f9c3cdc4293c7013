"""Small products and convolutions whose operands are all in flight at once; their weights before the kernel in front
has ended. See codegen/early.py."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.early import ACCESS, EarlyConfig, conv_source, product_source
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.reader import best_box
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import ConvFrame, Convolution, matched_convolution, read_convolution
from venturi.backends.cuda.tactics.products import MAX_CANDIDATES, Operands, Product, ProductKernel, misaligned

T = torch.Tensor
ARCH = 90
ALL_SHARED = 227 * 1024
MAX_SHARED = 220 * 1024
# Two programs a multiprocessor: the next kernel's weights arrive while this one computes.
HALF_SHARED = 108 * 1024
TILES = ((64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8), (128, 256, 8))
SPLITS = (1, 2, 4, 8)
MAX_WAVES = 16
CHANNELS = 64
_THREADS = 1536
# Nanoseconds: latencies of a program, of a reduction over programs; bytes and operations a multiprocessor moves in one.
_PROGRAM_NS, _REDUCE_NS, _BYTES_PER_NS, _FLOPS_PER_NS = 1500.0, 600.0, 60.0, 4500.0


def early_candidates(
    tiles: dict[int, tuple[int, EarlyConfig]], n: int, steps: int, num_sms: int, element: Element
) -> list[Config] | str:
    """The cheapest by a coarse model. `tiles` has, by rows a tile, how many there are and the shape of each.

    A text where there is so much to do that latencies do not matter.
    """
    scored: dict[EarlyConfig, float] = {}
    for bm, bn, warps in TILES:
        if bn > max(16, 1 << max(n - 1, 0).bit_length()):
            continue
        count, shape = tiles[bm]
        for split in SPLITS:
            programs, share = count * -(-n // bn) * split, -(-steps // split)
            if programs > (2 if split > 1 else MAX_WAVES) * num_sms or -(-steps // share) != split:
                continue
            if bm // split * bn < 32 * warps * ACCESS[split > 1]:
                continue
            empty = replace(shape, bn=bn, warps=warps, split=split)
            for limit in (HALF_SHARED, MAX_SHARED):
                c = replace(empty, depth=min(share, limit // step_bytes(empty, element)))
                if c.depth >= min(share, 3) and c.shared_bytes(element) <= ALL_SHARED:
                    scored[c] = _cost(c, element, -(-programs // num_sms), share)
    best = sorted(scored, key=lambda c: scored[c])[:MAX_CANDIDATES]
    return [asdict(c) for c in best] or f"more than {MAX_WAVES} programs a multiprocessor"


def step_bytes(c: EarlyConfig, element: Element) -> int:
    """Of a step's operands."""
    return (c.bm + c.bn) * c.step * element.bytes


def _cost(c: EarlyConfig, element: Element, programs: int, share: int) -> float:
    """Nanoseconds of a multiprocessor that runs `programs`, of `share` steps each, as many at a time as fit."""
    bytes = step_bytes(c, element)
    flops = 2.0 * share * c.step * c.bm * c.bn * element.bytes / 2
    moved = max(share * bytes / _BYTES_PER_NS, flops / _FLOPS_PER_NS)
    moved += 4 * c.bm * c.bn / _BYTES_PER_NS if c.split > 1 else 0.0
    resident = max(1, min(_THREADS // (32 * c.warps), ALL_SHARED // max(c.shared_bytes(element), 1)))
    rounds = _PROGRAM_NS * -(-programs // resident)
    return float(programs * moved + rounds + (_REDUCE_NS if c.split > 1 else 0.0))


class EarlyProduct(ProductKernel):
    """Matrix products with a fixed number of rows."""

    suffix = "-early"

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if p.rows is None or p.rows < 16:
            return "the number of rows is not fixed" if p.rows is None else f"{p.rows} rows"
        if obstacle := misaligned(p):
            return obstacle
        step = p.element.step
        tiles = {bm: (-(-p.rows // bm), EarlyConfig(bm, 0, 0, 0, step=step)) for bm in (64, 128)}
        return early_candidates(tiles, p.n, -(-p.k // step), device.num_sms, p.element)

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return product_source(region, p.tile, p.element, EarlyConfig(**config), p.n, p.k, arch)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        c, (rows, n, k) = EarlyConfig(**config), o.sizes
        tiles = -(-rows // c.bm) * -(-n // c.bn)
        kernel.launch((tiles, c.split), [o.x, o.weight, o.out, *o.columns, *o.tiles, rows, n, k])


EARLY = EarlyProduct()


def read_boxed(region: RegionView, arch: int) -> tuple[Convolution, tuple[int, int, int]] | str:
    """A convolution that can be a product over boxes of the image, and its result's [images, P, Q]; or why not."""
    conv = read_convolution(region)
    if isinstance(conv, str):
        return conv
    g = conv.geometry
    if arch != ARCH:
        return "written for Hopper's warpgroup products"
    if g.groups != 1 or g.channels % CHANNELS or g.outputs % conv.element.aligned or g.is_product:
        return f"not more than one tap on multiples of {CHANNELS} channels"
    if conv.fill and any(g.pads):
        return "what is outside the image is not zero"
    if g.strides not in ((1, 1), (2, 2)):
        return f"strides {g.strides}"
    if conv.size is None or conv.given is None or (g.strides == (2, 2) and (conv.given[2] % 2 or conv.given[3] % 2)):
        return "sizes that are not fixed, or odd with a stride of 2"
    return conv, (conv.size[0], conv.size[2], conv.size[3])


def tap_step(g: ConvGeometry, element: Element) -> int:
    """Channels of a step: as many as divide a tap's."""
    return CHANNELS if g.channels % element.step else element.step


def pixels_of(x: T, g: ConvGeometry) -> T:
    """An NHWC image as `conv_reader` reads it."""
    pixels = x.permute(0, 2, 3, 1)
    images, height, width, _ = pixels.shape
    return pixels.view(images, height // 2, 2, width // 2, 2 * g.channels) if g.strides == (2, 2) else pixels


class EarlyConv:
    """Ungrouped convolutions of stride 1 or 2 on multiples of 64 channels."""

    name = "triton-conv-early"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_boxed(region, self._device.arch)
        if isinstance(found, str):
            return found
        conv, size = found
        g, step = conv.geometry, tap_step(conv.geometry, conv.element)
        tiles = {}
        for bm in (64, 128):
            box = best_box(size, bm)
            tiles[bm] = box.count(size), EarlyConfig(bm, 0, 0, 0, 1, box.height, box.width, box.images, step)
        steps = g.kernel[0] * g.kernel[1] * g.channels // step
        return early_candidates(tiles, g.outputs, steps, self._device.num_sms, conv.element)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv, c = matched_convolution(region), EarlyConfig(**config)
        return [conv_source(region, conv.tile, conv.geometry, conv.element, c, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv, c = matched_convolution(region), EarlyConfig(**config)
        g, frame = conv.geometry, ConvFrame(region, conv, self._device)
        kernel, weight = self._device.kernel(self.sources(region, config)[0]), conv.packed(region)

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            images, _, _, p, q = sizes
            count = c.box.count((images, p, q)) * -(-g.outputs // c.bn)
            pointers = [pixels_of(x, g), weight, out, *frame.operands.columns, *tiles]
            kernel.launch((count, c.split), [*pointers, images, p, q, g.outputs])

        return frame.kernel(launch)
