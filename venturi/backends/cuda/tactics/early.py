"""Small products and convolutions whose operands are all in flight at once; their weights before the kernel in front
has ended. See codegen/early.py."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.early import ACCESS, STEP, EarlyConfig, conv_source, product_source
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import ConvFrame, matched_convolution, read_convolution
from venturi.backends.cuda.tactics.products import MAX_CANDIDATES, Operands, Product
from venturi.ir.build import static_shape

T = torch.Tensor
ARCH = 90
ALL_SHARED = 227 * 1024
MAX_SHARED = 220 * 1024
# Two programs a multiprocessor: the next kernel's weights arrive while this one computes.
HALF_SHARED = 108 * 1024
TILES = ((64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8), (128, 256, 8))
SPLITS = (1, 2, 4, 8)
WIDTHS = (4, 8, 16, 32, 64)
MAX_WAVES = 16
_THREADS = 1536
# Nanoseconds: latencies of a program, of a reduction over programs; bytes and operations a multiprocessor moves in one.
_PROGRAM_NS, _REDUCE_NS, _BYTES_PER_NS, _FLOPS_PER_NS = 1500.0, 600.0, 60.0, 4500.0


def early_candidates(tiles: dict[int, tuple[int, EarlyConfig]], n: int, steps: int, num_sms: int) -> list[Config] | str:
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
                c = replace(empty, depth=min(share, limit // empty.step_bytes))
                if c.depth >= min(share, 3):
                    scored[c] = _cost(c, -(-programs // num_sms), share)
    best = sorted(scored, key=lambda c: scored[c])[:MAX_CANDIDATES]
    return [asdict(c) for c in best] or f"more than {MAX_WAVES} programs a multiprocessor"


def _cost(c: EarlyConfig, programs: int, share: int) -> float:
    """Nanoseconds of a multiprocessor that runs `programs`, of `share` steps each, as many at a time as fit."""
    moved = max(share * c.step_bytes / _BYTES_PER_NS, 2.0 * share * STEP * c.bm * c.bn / _FLOPS_PER_NS)
    moved += 4 * c.bm * c.bn / _BYTES_PER_NS if c.split > 1 else 0.0
    resident = max(1, min(_THREADS // (32 * c.warps), ALL_SHARED // max(c.depth * c.step_bytes, c.peer_bytes)))
    rounds = _PROGRAM_NS * -(-programs // resident)
    return float(programs * moved + rounds + (_REDUCE_NS if c.split > 1 else 0.0))


class EarlyProduct:
    """Matrix products with a fixed number of rows."""

    suffix = "-early"

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if p.rows is None or p.rows < 16:
            return "the number of rows is not fixed" if p.rows is None else f"{p.rows} rows"
        if p.n % 8 or p.k % 8:
            return f"N={p.n} and K={p.k} must be multiples of 8"
        tiles = {bm: (-(-p.rows // bm), EarlyConfig(bm, 0, 0, 0)) for bm in (64, 128)}
        return early_candidates(tiles, p.n, -(-p.k // STEP), device.num_sms)

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return product_source(region, p.tile, p.dtype, EarlyConfig(**config), p.n, p.k, arch)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        c, (rows, n, k) = EarlyConfig(**config), o.sizes
        tiles = -(-rows // c.bm) * -(-n // c.bn)
        kernel.launch((tiles, c.split), [o.x, o.weight, o.out, *o.columns, *o.tiles, rows, n, k])


EARLY = EarlyProduct()


class EarlyConv:
    """Ungrouped convolutions of stride 1 or 2 on multiples of 64 channels."""

    name = "triton-conv-early"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        conv = read_convolution(region)
        if isinstance(conv, str):
            return conv
        g = conv.geometry
        if self._device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if g.groups != 1 or g.channels % STEP or g.outputs % 8 or g.is_product:
            return f"not more than one tap on multiples of {STEP} channels"
        if g.strides not in ((1, 1), (2, 2)):
            return f"strides {g.strides}"
        image = static_shape(region.anchor.inputs[0])
        size = static_shape(region.anchor.outputs[0])
        if size is None or image is None or (g.strides == (2, 2) and (image[2] % 2 or image[3] % 2)):
            return "sizes that are not fixed, or odd with a stride of 2"
        tiles = {bm: _box(size[0], size[2], size[3], bm) for bm in (64, 128)}
        return early_candidates(tiles, g.outputs, _steps(g), self._device.num_sms)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv, c = matched_convolution(region), EarlyConfig(**config)
        return [conv_source(region, conv.tile, conv.geometry, conv.dtype, c, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv, c = matched_convolution(region), EarlyConfig(**config)
        g, frame = conv.geometry, ConvFrame(region, conv, self._device)
        kernel, weight = self._device.kernel(self.sources(region, config)[0]), conv.packed(region)

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            images, height, width, p, q = sizes
            pixels = x.permute(0, 2, 3, 1)
            if g.strides == (2, 2):
                pixels = pixels.view(images, height // 2, 2, width // 2, 2 * g.channels)
            boxes = -(-images // c.images) * -(-p // c.height) * -(-q // c.width)
            count = boxes * -(-g.outputs // c.bn)
            pointers = [pixels, weight, out, *frame.operands.columns, *tiles]
            kernel.launch((count, c.split), [*pointers, images, p, q, g.outputs])

        return frame.kernel(launch)


def _steps(g: ConvGeometry) -> int:
    return g.kernel[0] * g.kernel[1] * g.channels // STEP


def _box(images: int, p: int, q: int, bm: int) -> tuple[int, EarlyConfig]:
    """The squarest of the boxes that cover all pixels with the fewest tiles: its taps overlap most."""
    boxes = [(g, bm // g // w, w) for g in (1, 2, 4) for w in WIDTHS if w * g <= bm and (g == 1 or g <= images)]
    boxes.sort(key=lambda b: (b[0], b[1] + b[2]))
    counts = {(g, h, w): -(-images // g) * -(-p // h) * -(-q // w) for g, h, w in boxes}
    g, h, w = min(boxes, key=lambda b: counts[b])
    return counts[g, h, w], EarlyConfig(bm, 0, 0, 0, 1, h, w, g)
