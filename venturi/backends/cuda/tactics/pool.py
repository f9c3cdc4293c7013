"""NHWC pooling and means over images as Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.expressions import BYTE_LIMITS, WIDE
from venturi.backends.cuda.codegen.pool import mean_source, window_source
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.scratch import current_scratch
from venturi.backends.cuda.tactics.conv import NHWC, nhwc
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import dim, ints, rank, static_shape

T = torch.Tensor


def read_window(region: RegionView) -> tuple[ConvGeometry, bool, bool] | str:
    """(geometry, mean, padding counts) of a 2-D MaxPool or AveragePool that is marked NHWC."""
    node = region.node
    if node.domain or node.op_type not in ("MaxPool", "AveragePool"):
        return "not a window pooling"
    x, channels = node.inputs[0], dim(node.inputs[0], 1)
    if rank(x) != 4 or channels is None or region.layout != "NHWC" or x is None or x.dtype not in (*WIDE, *BYTE_LIMITS):
        return "not NHWC with a fixed number of channels"
    if x.dtype in BYTE_LIMITS and node.op_type != "MaxPool":
        return "a mean of integers"
    attrs = region.attrs(node)
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "the indices are read"
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0):
        return "auto_pad or ceil_mode"
    pads = tuple(attrs.get("pads") or [0] * 4)
    geometry = ConvGeometry(
        channels, channels, tuple(attrs["kernel_shape"]), tuple(attrs.get("strides") or [1, 1]), pads,
        tuple(attrs.get("dilations") or [1, 1]), channels,
    )  # fmt: skip
    return geometry, node.op_type == "AveragePool", bool(attrs.get("count_include_pad", 0))


class WindowPool:
    name = "triton-pool"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_window(region)
        if isinstance(found, str):
            return found
        return [
            {"pixels": p, "width": w, "warps": n}
            for p, w, n in ((8, 64, 4), (16, 64, 4), (4, 64, 2), (16, 32, 4), (32, 64, 4))
        ]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        found = read_window(region)
        assert not isinstance(found, str)
        dtype, size = region.outputs[0].dtype, (config["pixels"], config["width"], config["warps"])
        assert dtype is not None
        return [window_source(region, found[0], dtype, found[1], found[2], size, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_window(region)
        assert not isinstance(found, str)
        geometry = found[0]
        kernel, fallback = self._device.kernel(self.sources(region, config)[0]), DeviceReference().bind(region, {}).run
        pixels, width = config["pixels"], config["width"]

        def run(x: T) -> Any:
            images, channels, height, wide = x.shape
            p, q = geometry.output_size(height, wide)
            if not x.numel() or min(p, q) <= 0 or height * wide * channels >= 2**31 or images * p * q >= 2**31:
                return fallback(x)
            out = torch.empty((images, channels, p, q), dtype=x.dtype, device=x.device, memory_format=NHWC)
            grid = (-(-images * p * q // pixels), -(-channels // width))
            kernel.launch(grid, [nhwc(x), out, images, height, wide, p, q, channels])
            return out

        return Kernel(run)


def read_mean(region: RegionView) -> bool | str:
    """Whether the two spatial dimensions are kept, of a mean over exactly those of an NHWC value."""
    node = region.node
    if node.domain or node.op_type not in ("GlobalAveragePool", "ReduceMean"):
        return "not a mean"
    x = node.inputs[0]
    if x is None or rank(x) != 4 or dim(x, 1) is None or x.dtype not in WIDE:
        return "not four dimensions with a fixed number of channels"
    if node.op_type == "GlobalAveragePool":
        return True
    axes = ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or sorted(a % 4 for a in axes) != [2, 3]:
        return "not over both spatial dimensions"
    return bool(region.attrs(node).get("keepdims", 1))


class ImageMean:
    """Global average pooling."""

    name = "triton-image-mean"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_mean(region)
        if isinstance(found, str):
            return found
        shape = static_shape(region.node.inputs[0])
        pixels = shape[2] * shape[3] if shape else 1024
        splits = [s for s in (1, 2, 4, 8, 16, 32) if s == 1 or pixels // s >= 32]
        blocks = ((32, 64), (64, 32), (128, 32)) if pixels > 64 else ((32, 64), (16, 64), (64, 32))
        return [{"rows": r, "width": w, "split": s} for s in splits[-4:] for r, w in blocks]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        dtype, wide = region.outputs[0].dtype, (dim(region.node.inputs[0], 1) or 1) % 16 == 0
        assert dtype is not None
        block = (config["rows"], config["width"])
        return [mean_source(region, dtype, wide, block, config["split"], self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        kept = read_mean(region)
        kernel, fallback = self._device.kernel(self.sources(region, config)[0]), DeviceReference().bind(region, {}).run
        width, split = config["width"], config["split"]

        def run(x: T) -> Any:
            images, channels, height, wide = x.shape
            if not x.numel():
                return fallback(x)
            out = torch.empty((images, channels), dtype=x.dtype, device=x.device)
            blocks, scratch = images * -(-channels // width), current_scratch(x.device)
            work = scratch.sums(1 if split == 1 else split * images * channels)
            locks = scratch.tickets(1 if split == 1 else blocks)
            kernel.launch((blocks, split), [nhwc(x), out, work, locks, images, height * wide, channels])
            return out.view(images, channels, 1, 1) if kept else out

        return Kernel(run)
