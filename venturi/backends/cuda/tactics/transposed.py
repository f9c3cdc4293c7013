"""Transposed 2-D convolutions as Triton kernels on NHWC memory, with the whole epilogue fused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.dots import stored
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.tile import TileBody, read_tile
from venturi.backends.cuda.codegen.transposed import TransposedGeometry, transposed_source
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.candidates import product_candidates
from venturi.backends.cuda.tactics.conv import NHWC, nhwc
from venturi.backends.cuda.tactics.operands import ConvOperands, read_operands
from venturi.backends.cuda.tactics.products import MAX_CANDIDATES, TileOperands, num_tiles
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import static_shape
from venturi.ops.tensors import STORAGE

T = torch.Tensor


@dataclass(frozen=True)
class Transposed:
    """A ConvTranspose anchor with constant weights [channels, outputs, R, S] and its epilogue."""

    geometry: TransposedGeometry
    given: ConvOperands
    tile: TileBody
    size: tuple[int, ...] | None


def read_transposed(region: RegionView) -> Transposed | str:
    """Of floating point, ungrouped and undilated; or why it is none."""
    given = read_operands(region, "ConvTranspose", 2)
    if isinstance(given, str):
        return given
    attrs, shape = region.attrs(region.anchor), given.shape
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("output_shape"):
        return "pads depend on the input size"
    pads, extra = attrs.get("pads") or [0] * 4, attrs.get("output_padding") or [0, 0]
    if attrs.get("group", 1) != 1 or max(attrs.get("dilations") or [1, 1]) > 1 or min(pads) < 0:
        return "groups, dilations or negative pads"
    tile = read_tile(region, 1, given.bias)
    if isinstance(tile, str):
        return tile
    strides = tuple(attrs.get("strides") or [1, 1])
    geometry = TransposedGeometry(shape[0], shape[1], (shape[2], shape[3]), strides, tuple(pads), tuple(extra))
    size = static_shape(region.anchor.outputs[0])
    return Transposed(geometry, given, tile, None if size is None else tuple(size))


class TransposedConv:
    """Any kernel size and stride: an implicit product for every phase of the stride, all in one launch."""

    name = "triton-conv-transposed"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_transposed(region)
        if isinstance(made, str):
            return made
        g, size = made.geometry, made.size
        rows = None if size is None else size[0] * size[2] * size[3]
        found = product_candidates(
            rows, g.outputs, g.depth, self._device.num_sms, 2 * MAX_CANDIDATES, splits=False, element=made.given.element
        )
        fits: list[Config] = [asdict(c) for c in found if g.channels % c.bk == 0]
        return fits[:MAX_CANDIDATES] or f"{g.channels} channels are no multiple of a step"

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made, arch = _matched(region), self._device.arch
        return [transposed_source(region, made.tile, made.geometry, made.given.element, GemmConfig(**config), arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made, c = _matched(region), GemmConfig(**config)
        g, operands = made.geometry, TileOperands(region, made.tile)
        kernel = self._device.kernel(self.sources(region, config)[0])
        weight = stored(g.weights(region.constant(made.given.weight)), made.given.element)
        dtype, fallback = STORAGE[made.tile.output.dtype], DeviceReference().bind(region, {}).run  # type: ignore[index]

        def run(*args: Any) -> Any:
            x: T = args[made.given.first]
            images, channels, height, width = x.shape
            p, q = g.output_size(height, width)
            rows, columns = g.phase_size(p, q)
            many = max(height * width * channels, images * rows * columns * g.phases)
            if not x.numel() or channels != g.channels or p <= 0 or q <= 0 or many >= 2**31:
                return fallback(*args)
            out = torch.empty((images, g.outputs, p, q), dtype=dtype, device=x.device, memory_format=NHWC)
            tiles = [nhwc(t) for t in operands.tiles(args)]
            grid = (num_tiles(images * rows * columns, g.outputs, c), g.phases)
            sizes = [images, height, width, p, q, g.outputs]
            kernel.launch(grid, [nhwc(x), weight, out, *operands.columns, *tiles, *sizes])
            return out

        return Kernel(run)


def _matched(region: RegionView) -> Transposed:
    made = read_transposed(region)
    assert isinstance(made, Transposed)
    return made
