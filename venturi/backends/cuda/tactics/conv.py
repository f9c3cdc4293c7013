"""2-D convolutions as Triton kernels on NHWC memory, with the whole epilogue fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry, depthwise_source, implicit_source
from venturi.backends.cuda.codegen.dots import stored
from venturi.backends.cuda.codegen.element import EVERY, FLOATS, HALF, Element
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.pack import PIXELS, WIDTH, pack_source
from venturi.backends.cuda.codegen.tile import TileBody, read_tile
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.candidates import product_candidates
from venturi.backends.cuda.tactics.products import (
    MAX_CANDIDATES,
    Operands,
    Product,
    ProductKernel,
    TileOperands,
    num_tiles,
    split_buffers,
)
from venturi.backends.cuda.tactics.quantized import read_ends
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.real_view import RealView
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8
from venturi.ops.tensors import STORAGE

T = torch.Tensor
NHWC = torch.channels_last


@dataclass(frozen=True)
class Convolution:
    """A Conv anchor with constant weights [outputs, channels / groups, R, S] and its epilogue.

    `given` and `size` are the image's and the result's [images, channels, height, width] where they are fixed; `fill`
    is what stands for zero outside the image.
    """

    geometry: ConvGeometry
    weight: ir.Value
    dtype: DT
    tile: TileBody
    given: tuple[int, ...] | None
    size: tuple[int, ...] | None
    first: int
    given_channels: int
    fill: int = 0
    tf32: bool = False

    @property
    def element(self) -> Element:
        return Element(self.dtype, self.tf32)

    @property
    def rows(self) -> int | None:
        """Pixels of the result."""
        return None if self.size is None else self.size[0] * self.size[2] * self.size[3]

    @property
    def is_padded(self) -> bool:
        """Whether the image is copied into 8 channels first; `geometry` then speaks of those."""
        return self.given_channels != self.geometry.channels

    def weights(self, region: RegionView) -> T:
        """NHWC [outputs, channels / groups, R, S] with zeros in padded channels."""
        stored: T = region.constant(self.weight)
        if self.is_padded:
            stored = F.pad(stored, [0, 0, 0, 0, 0, self.geometry.channels - self.given_channels])
        return stored.contiguous(memory_format=NHWC)

    def packed(self, region: RegionView) -> T:
        """[outputs, R * S * channels], taps slowest."""
        stored = self.weights(region)
        return stored.permute(0, 2, 3, 1).reshape(stored.shape[0], -1).contiguous()


def read_convolution(region: RegionView, kinds: Sequence[DT] = HALF) -> Convolution | str:
    """Of these types, or of signed bytes in a quantized Region; or why it is none."""
    real = RealView(region) if region.kind == "quantized" else None
    view = real or region
    node = view.anchor
    if node.domain or node.op_type != "Conv":
        return "the anchor is not Conv"
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not view.is_constant(weight) or view.position(x) is None:
        return "weights are computed at run time"
    shape = static_shape(weight)
    if shape is None or len(shape) != 4 or 0 in shape:
        return "not a 2-D convolution"
    ends = None if real is None else read_ends(real, 0)
    if isinstance(ends, str):
        return ends
    if ends is not None and ends.dtype == FP8 and FP8 not in kinds:
        return "bytes of floating point"
    if ends is None and (weight.dtype not in kinds or x.dtype != weight.dtype):
        return "not half precision"
    attrs = region.attrs(node)
    if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad SAME depends on the input size"
    pads = [0] * 4 if attrs.get("auto_pad") == "VALID" else attrs.get("pads") or [0] * 4
    if min(pads) < 0:
        return "negative pads"
    groups = int(attrs.get("group", 1))
    strides, dilations = attrs.get("strides") or [1, 1], attrs.get("dilations") or [1, 1]
    channels = shape[1] * groups
    padded = WIDTH if groups == 1 and channels < WIDTH else channels
    geometry = ConvGeometry(
        padded, shape[0], (shape[2], shape[3]), tuple(strides), tuple(pads), tuple(dilations), groups
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not view.is_constant(bias):
        return "bias computed at run time"
    tile = read_tile(region, 1, bias) if ends is None else ends.tile(1, bias)
    if isinstance(tile, str):
        return tile
    given, size = (None if d is None else tuple(d) for d in (static_shape(x), static_shape(node.outputs[0])))
    stored, dtype, fill = (weight, weight.dtype, 0) if ends is None else (ends.weight, ends.dtype, ends.image.zero)
    assert dtype is not None
    return Convolution(geometry, stored, dtype, tile, given, size, view.position(x) or 0, channels, fill, region.tf32)


def read_both(parts: tuple[RegionView, RegionView]) -> tuple[Convolution, Convolution] | str:
    """The convolutions of both parts of a pair, or why one is none."""
    first = read_convolution(parts[0])
    if isinstance(first, str):
        return first
    second = read_convolution(parts[1])
    return second if isinstance(second, str) else (first, second)


def matched_convolution(region: RegionView) -> Convolution:
    """Of a Region that a convolution's tactic has accepted."""
    conv = read_convolution(region, EVERY)
    assert isinstance(conv, Convolution)
    return conv


def nhwc(x: T) -> T:
    """Channels last in memory and 16-byte aligned; copied only if needed."""
    x = x.contiguous(memory_format=NHWC)
    if x.data_ptr() % 16 == 0 and x.stride(1) == 1:
        return x
    return x.permute(0, 2, 3, 1).contiguous().clone().permute(0, 3, 1, 2)


class ConvFrame:
    """What all convolution kernels share at run time: output, residuals, the fallback for empty inputs."""

    def __init__(self, region: RegionView, conv: Convolution, device: KernelDevice) -> None:
        self.conv = conv
        self.operands = TileOperands(region, conv.tile)
        self.fallback = DeviceReference().bind(region, {}).run
        self._dtype = STORAGE[conv.tile.output.dtype]  # type: ignore[index]
        self._pack = None
        if conv.is_padded:
            self._pack = device.kernel(pack_source(region, conv.dtype, conv.given_channels, device.arch))

    def image(self, x: T) -> T:
        """The input as kernels read it: NHWC, few channels padded to 8."""
        if self._pack is None:
            return nhwc(x)
        images, _, height, width = x.shape
        out = torch.empty((images, WIDTH, height, width), dtype=x.dtype, device=x.device, memory_format=NHWC)
        grid = (-(-images * height * width // PIXELS),)
        self._pack.launch(grid, [x, out, images, height, width, *x.stride()])
        return out

    def kernel(self, launch: Callable[[T, T, list[T], list[int]], None]) -> Kernel:
        """`launch(x, out, tiles, [images, H, W, P, Q])` on NHWC tensors."""
        g = self.conv.geometry

        def run(*args: Any) -> Any:
            x: T = args[self.conv.first]
            if not x.numel() or x.shape[1] != self.conv.given_channels:
                return self.fallback(*args)
            images, _, height, width = x.shape
            p, q = g.output_size(height, width)
            if p <= 0 or q <= 0 or height * width * g.channels >= 2**31 or images * p * q >= 2**31:
                return self.fallback(*args)
            out = torch.empty((images, g.outputs, p, q), dtype=self._dtype, device=x.device, memory_format=NHWC)
            launch(self.image(x), out, [nhwc(t) for t in self.operands.tiles(args)], [images, height, width, p, q])
            return out

        return Kernel(run)


class ImplicitGemmConv:
    """Any kernel size, stride and dilation, ungrouped: rows are pixels, the sum runs over taps and channels."""

    name = "triton-conv"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        conv = read_convolution(region, EVERY)
        if isinstance(conv, str):
            return conv
        g = conv.geometry
        if g.groups != 1:
            return f"{g.groups} groups"
        depth = g.kernel[0] * g.kernel[1] * g.channels
        found = product_candidates(
            conv.rows, g.outputs, depth, self._device.num_sms, MAX_CANDIDATES, splits=True, element=conv.element
        )
        return [asdict(c) for c in found]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv = matched_convolution(region)
        c, arch = GemmConfig(**config), self._device.arch
        product = implicit_source(region, conv.tile, conv.geometry, conv.element, c, arch, conv.fill)
        return [product, *pack_sources(region, conv, self._device)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv = matched_convolution(region)
        g, c, frame = conv.geometry, GemmConfig(**config), ConvFrame(region, conv, self._device)
        kernel = self._device.kernel(self.sources(region, config)[0])
        weight = stored(conv.packed(region), conv.element)

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            rows = sizes[0] * sizes[3] * sizes[4]
            count = num_tiles(rows, g.outputs, c)
            work, locks = split_buffers(out, c.split, rows * g.outputs, count)
            columns = frame.operands.columns
            kernel.launch((count, c.split), [x, weight, out, *columns, *tiles, work, locks, *sizes, g.outputs])

        return frame.kernel(launch)


class PixelProduct:
    """1x1 with unit strides: a product kernel over pixels."""

    def __init__(self, device: KernelDevice, kernel: ProductKernel) -> None:
        self.name = f"triton-conv-1x1{kernel.suffix}"
        self._device, self._kernel = device, kernel

    def match(self, region: RegionView) -> list[Config] | str:
        conv = read_convolution(region, self._kernel.kinds)
        if isinstance(conv, str):
            return conv
        if not conv.geometry.is_product:
            return "not 1x1 with unit strides"
        return self._kernel.configs(self._product(conv), self._device)

    @staticmethod
    def _product(conv: Convolution) -> Product:
        return Product(conv.rows, conv.geometry.outputs, conv.geometry.channels, conv.dtype, conv.tile, conv.tf32)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv = matched_convolution(region)
        return [
            self._kernel.source(region, self._product(conv), config, self._device.arch),
            *pack_sources(region, conv, self._device),
        ]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv = matched_convolution(region)
        device, frame = self._device, ConvFrame(region, conv, self._device)
        kernel = device.kernel(self.sources(region, config)[0])
        weight = self._kernel.weights(conv.packed(region), self._product(conv), config)

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            rows = sizes[0] * sizes[1] * sizes[2]
            flat = [_pixels(t, rows) for t in (x, out, *tiles)]
            self._kernel.launch(
                kernel, config, device, Operands(flat[0], weight, flat[1], flat[2:], frame.operands.columns)
            )

        return frame.kernel(launch)


def _pixels(x: T, rows: int) -> T:
    """An NHWC tensor as [pixels, channels]."""
    return x.permute(0, 2, 3, 1).reshape(rows, x.shape[1])


def pack_sources(region: RegionView, conv: Convolution, device: KernelDevice) -> list[KernelSource]:
    """The kernel that pads few channels to 8, where the convolution needs it."""
    return [pack_source(region, conv.dtype, conv.given_channels, device.arch)] if conv.is_padded else []


class DepthwiseConv:
    """One filter a channel, on the ordinary arithmetic units; memory-bound."""

    name = "triton-depthwise"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        conv = read_convolution(region, FLOATS)
        if isinstance(conv, str):
            return conv
        g = conv.geometry
        if not g.groups == g.channels == g.outputs:
            return "not one filter a channel"
        if conv.dtype not in FLOATS:
            return "not floating point"
        options = ((8, 64, 4), (16, 64, 4), (32, 32, 4), (4, 128, 4), (32, 64, 8), (16, 32, 2), (4, 64, 2), (64, 32, 4))
        return [{"pixels": p, "width": w, "warps": n} for p, w, n in options]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv = matched_convolution(region)
        size = (config["pixels"], config["width"], config["warps"])
        return [depthwise_source(region, conv.tile, conv.geometry, conv.dtype, *size, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv = matched_convolution(region)
        g, frame = conv.geometry, ConvFrame(region, conv, self._device)
        kernel = self._device.kernel(self.sources(region, config)[0])
        stored: T = region.constant(conv.weight)
        weight = stored.reshape(g.channels, -1).T.contiguous()
        pixels, width = config["pixels"], config["width"]

        def launch(x: T, out: T, tiles: list[T], sizes: list[int]) -> None:
            rows = sizes[0] * sizes[3] * sizes[4]
            grid = (-(-rows // pixels), -(-g.channels // width))
            kernel.launch(grid, [x, weight, out, *frame.operands.columns, *tiles, *sizes])

        return frame.kernel(launch)
