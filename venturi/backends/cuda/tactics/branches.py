"""Two 1x1 convolutions that are added, in one kernel: the block of a residual network whose shortcut is a convolution.

Their sum is one product over the channels of both images, so that the shortcut is neither written nor read. See
codegen/pingpong.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.element import HALF
from venturi.backends.cuda.codegen.pingpong import branches_source
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.conv import NHWC, Convolution, nhwc, read_both
from venturi.backends.cuda.tactics.early import CHANNELS, pixels_of, tap_step
from venturi.backends.cuda.tactics.pingpong import num_programs, pingpong_candidates, read_pingpong
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.part_view import PartView, branches_of
from venturi.ops.tensors import STORAGE

T = torch.Tensor


@dataclass(frozen=True)
class Branches:
    """`here` has stride 1, `there` 1 or 2, each with its part of the Region. `tile` is the epilogue of their sum, whose
    columns are in `biases`."""

    here: tuple[PartView, Convolution]
    there: tuple[PartView, Convolution]
    tile: TileBody
    biases: list[T]

    @property
    def geometries(self) -> tuple[ConvGeometry, ConvGeometry]:
        return self.here[1].geometry, self.there[1].geometry

    def weight(self, columns: int) -> T:
        """[outputs, channels of both] as the kernel reads them."""
        return shuffled(torch.cat([c.packed(p) for p, c in (self.here, self.there)], 1), self.tile, columns)


def read_branches(region: RegionView) -> Branches | str:
    parts = branches_of(region)
    if parts is None or len(region.outputs) != 1:
        return "not two convolutions that are added"
    found = read_both(parts)
    if isinstance(found, str):
        return found
    shortcut, last = found
    if last.tile.tiles != (parts[0].outputs[0],) or shortcut.tile.tiles:
        return "the shortcut is not the only residual"
    if last.dtype not in HALF or shortcut.dtype != last.dtype:
        return "not half precision"
    both = (parts[1], last), (parts[0], shortcut)
    here, there = both if last.geometry.strides == (1, 1) else both[::-1]
    plain = all(
        c.geometry.kernel == (1, 1) and not any(c.geometry.pads) and c.geometry.groups == 1
        and c.geometry.channels % CHANNELS == 0 for _, c in both
    )  # fmt: skip
    if not plain or here[1].geometry.strides != (1, 1) or there[1].geometry.strides not in ((1, 1), (2, 2)):
        return f"not 1x1 on multiples of {CHANNELS} channels, of strides 1 and 1 or 2"
    given = there[1].given
    if here[1].size is None or given is None or last.geometry.outputs % last.element.aligned:
        return "sizes that are not fixed"
    if there[1].geometry.strides == (2, 2) and (given[2] % 2 or given[3] % 2):
        return "an odd image with a stride of 2"
    biases = [*last.tile.column_tensors(parts[1]), *shortcut.tile.column_tensors(parts[0])]
    return Branches(here, there, _tile(last.tile, shortcut.tile), biases)


def _tile(last: TileBody, shortcut: TileBody) -> TileBody:
    """The residual is in the sums but for its bias."""
    bias = f"b{len(last.columns)}" if shortcut.columns else "0.0"
    return replace(last, columns=(*last.columns, *shortcut.columns), tiles=(), lines=(f"t0 = {bias}", *last.lines))


class BranchesConv:
    name = "triton-conv-branches"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_branches(region)
        if isinstance(found, str):
            return found
        here, there = found.geometries
        more = there.channels // tap_step(there, found.here[1].element)
        return pingpong_candidates(found.here[1], here, found.tile, self._device, more)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        found = read_branches(region)
        assert not isinstance(found, str)
        (size, box, step), element = read_pingpong(config), found.here[1].element
        return [branches_source(region, found.tile, element, size, *found.geometries, box, step, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_branches(region)
        assert not isinstance(found, str)
        (size, box, _), both = read_pingpong(config), (found.here, found.there)
        kernel, fallback = self._device.kernel(self.sources(region, config)[0]), DeviceReference().bind(region, {}).run
        weight, biases = found.weight(size.columns), found.biases
        at = [region.position(p.dynamic[c.first]) for p, c in both]
        dtype, n = STORAGE[found.tile.output.dtype], found.geometries[0].outputs  # type: ignore[index]

        def run(*args: Any) -> Any:
            given = [args[i or 0] for i in at]
            if any(list(x.shape) != list(c.given or ()) for x, (_, c) in zip(given, both)) or not given[0].numel():
                return fallback(*args)
            images, _, p, q = given[0].shape
            out = torch.empty((images, n, p, q), dtype=dtype, device=given[0].device, memory_format=NHWC)
            count = box.count((images, p, q)) * -(-n // size.columns)
            pixels = [pixels_of(nhwc(x), g) for x, g in zip(given, found.geometries)]
            programs = num_programs(size, count, n, self._device.num_sms)
            kernel.launch((programs,), [*pixels, weight, out, *biases, images, p, q, n])
            return out

        return Kernel(run)
