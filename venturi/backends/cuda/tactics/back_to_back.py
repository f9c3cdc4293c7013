"""Two 1x1 convolutions in one kernel, where reading the wide tensor between them is what the second one costs. See
codegen/back_to_back.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.back_to_back import PairSizes, PairTile, pair_source
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import NHWC, Convolution, nhwc, read_both
from venturi.backends.cuda.tactics.early import ALL_SHARED, ARCH, tap_step
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.part_view import PartView, parts_of
from venturi.ops.tensors import STORAGE

T = torch.Tensor
# Rows of a group of warps, and how many groups.
SHAPES = ((64, 3), (128, 2), (64, 2))
NARROW = (64, 128, 256)
RINGS = (4, 3, 2)
MAX_CHUNKS = 16
# Registers of sums a thread can have beside all else, by the number of groups.
MAX_SUMS = {2: 160, 3: 100}
_BARRIERS = 1024


@dataclass(frozen=True)
class PairOfConvs:
    """The second convolution reads what the first one gives."""

    parts: tuple[PartView, PartView]
    first: Convolution
    second: Convolution

    @property
    def sizes(self) -> PairSizes:
        g = self.first.geometry
        return PairSizes(g.channels, g.outputs, self.second.geometry.outputs, tap_step(g, self.first.element))


def read_pair(region: RegionView) -> PairOfConvs | str:
    parts = parts_of(region)
    if parts is None:
        return "not two contractions in one Region"
    both = read_both(parts)
    if isinstance(both, str):
        return both
    first, second = both
    pair = PairOfConvs(parts, first, second)
    if not (first.geometry.is_product and second.geometry.is_product) or first.is_padded or second.is_padded:
        return "not 1x1 with unit strides"
    if second.dtype != first.dtype or first.tile.output.dtype != first.dtype:
        return "not of the same type throughout"
    if parts[1].dynamic[second.first] is not first.tile.output or any(
        v is first.tile.output for v in second.tile.tiles
    ):
        return "the second reads something else"
    if any(v.dtype != first.dtype for v in first.tile.tiles) or len(first.tile.tiles) > 1:
        return "more than one residual, or one of another type"
    s, step = pair.sizes, first.element.step
    if s.depth % s.deep or s.wide % step or s.wide // step > MAX_CHUNKS or s.narrow not in NARROW:
        return f"{s.depth} -> {s.wide} -> {s.narrow} channels: not multiples of {s.deep} and {step} that fit"
    return pair


class BackToBack:
    name = "triton-conv-pair"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        pair = read_pair(region)
        if isinstance(pair, str):
            return pair
        if self._device.arch != ARCH:
            return "written for Hopper's warpgroup products"
        if pair.first.rows is None:
            return "the number of pixels is not fixed"
        fits = [c for rows, groups in SHAPES for c in _fitting(pair, rows, groups)]
        found: list[Config] = [asdict(c) for c in fits if pair.first.rows >= c.rows * c.groups * self._device.num_sms]
        return found or "not as many tiles as multiprocessors, or too large for one"

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        pair = read_pair(region)
        assert not isinstance(pair, str)
        first, second = pair.first, pair.second
        return [
            pair_source(
                region, first.tile, second.tile, first.element, PairTile(**config), pair.sizes,
                stores_wide=len(region.outputs) == 2, arch=self._device.arch,
            )
        ]  # fmt: skip

    def bind(self, region: RegionView, config: Config) -> Kernel:
        pair = read_pair(region)
        assert not isinstance(pair, str)
        c, s, x_at = PairTile(**config), pair.sizes, region.position(pair.parts[0].dynamic[pair.first.first])
        kernel, fallback = self._device.kernel(self.sources(region, config)[0]), DeviceReference().bind(region, {}).run
        w1, w2 = _weights(pair)
        columns = [conv.tile.column_tensors(part) for conv, part in zip((pair.first, pair.second), pair.parts)]
        tiles = [[region.position(v) for v in conv.tile.tiles] for conv in (pair.first, pair.second)]
        dtypes = [STORAGE[conv.tile.output.dtype] for conv in (pair.first, pair.second)]  # type: ignore[index]
        both = len(region.outputs) == 2
        assert x_at is not None
        at = x_at

        def run(*args: Any) -> Any:
            x: T = args[at]
            if not x.numel() or x.shape[1] != s.depth or x.numel() // s.depth >= 2**31:
                return fallback(*args)
            images, _, height, width = x.shape
            pixels = images * height * width
            wide, narrow = (
                torch.empty((images, n, height, width), dtype=dtype, device=x.device, memory_format=NHWC)
                for n, dtype in zip((s.wide if both else 0, s.narrow), dtypes)
            )
            extra = [[nhwc(args[p]) for p in found if p is not None] for found in tiles]
            flat = [_pixels(t, pixels) for t in (x, *extra[0])]
            pointers = [*([wide] if both else []), *columns[0], narrow, *columns[1], *extra[1]]
            count = -(-pixels // (c.rows * c.groups))
            operands = [flat[0], w1, w2, *flat[1:], *pointers, pixels]
            kernel.launch((min(count, self._device.num_sms),), operands)
            return (wide, narrow) if both else narrow

        return Kernel(run)


def _fitting(pair: PairOfConvs, rows: int, groups: int) -> list[PairTile]:
    """With all weights in shared memory if possible, else with several rings of them; with the more rows in flight the
    less room residuals need."""
    s, element, least = pair.sizes, pair.first.element, 2 * groups if pair.first.tile.tiles else 0
    if rows * (element.step + s.narrow) // 128 > MAX_SUMS[groups]:
        return []
    found = []
    for ring in (0, *RINGS):
        for stages in (2 * groups, groups + 1, groups):
            left = ALL_SHARED - _BARRIERS - s.shared_bytes(PairTile(rows, groups, stages, ring), element)
            ahead = min(left // (rows * element.step * element.bytes), 2 * least)
            if left >= 0 and ahead >= least:
                found.append(PairTile(rows, groups, stages, ring, ahead))
                break
        if found and not ring:
            break
    return found


def _pixels(x: T, rows: int) -> T:
    """[pixels, channels]."""
    return nhwc(x).permute(0, 2, 3, 1).reshape(rows, x.shape[1])


def _weights(pair: PairOfConvs) -> tuple[T, T]:
    """As the kernel reads them: columns of the second in the order in which the first one's sums lie."""
    (first, second), step = pair.parts, pair.first.element.step
    w1 = shuffled(pair.first.packed(first), pair.first.tile, step)
    together = 4 // pair.first.element.bytes
    w2 = shuffled(pair.second.packed(second).T.contiguous(), pair.first.tile, step, together).T.contiguous()
    return w1, shuffled(w2, pair.second.tile, pair.sizes.narrow)
