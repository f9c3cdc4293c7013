"""Pointwise clusters, softmax and norms as generated Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.pointwise import Pointwise, read_pointwise, static_total
from venturi.backends.cuda.codegen.rows import Rows, next_power_of_2, read_rows
from venturi.backends.cuda.codegen.space import Space
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ops.tensors import STORAGE

T = torch.Tensor


class Operands:
    """Gathers a kernel's pointer operands from dynamic inputs and constants, dense in the kernel's memory order."""

    def __init__(self, region: RegionView, space: Space, pointers: Sequence[ir.Value]) -> None:
        self._space = space
        self._sources: list[int | T] = []
        for value in pointers:
            weight = region.constant(value)
            position = region.position(value)
            self._sources.append(space.dense(weight) if weight is not None else -1 if position is None else position)

    def __call__(self, args: Sequence[Any]) -> list[T]:
        return [args[s] if isinstance(s, int) else s for s in self._sources]


class TritonPointwise:
    """Every element by one thread; intermediate values never leave registers."""

    name = "triton-pointwise"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_pointwise(region)
        if isinstance(made, str):
            return made
        total = static_total(made.space)
        if total is not None and total <= 1 << 16:
            return [{"block": 256, "warps": 2}, {"block": 512, "warps": 4}]
        return [{"block": b, "warps": w} for b, w in ((1024, 4), (512, 4), (2048, 8), (4096, 8))]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_pointwise(region)
        assert isinstance(made, Pointwise)
        return [made.source(config["block"], config["warps"], self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_pointwise(region)
        assert isinstance(made, Pointwise)
        kernel = self._device.kernel(made.source(config["block"], config["warps"], self._device.arch))
        operands, space, block = Operands(region, made.space, made.pointers), made.space, config["block"]
        dtype = STORAGE[made.output.dtype]  # type: ignore[index]
        fallback = DeviceReference().bind(region, {}).run
        runtime = [i for i, axis in enumerate(space.axes) if i and axis.size is None]

        def run(*args: Any) -> Any:
            inputs = operands(args)
            shape = torch.broadcast_shapes(*(x.shape for x in inputs))
            total = shape.numel()
            if total >= 2**31 or not space.admits(shape, inputs):
                return fallback(*args)
            out = space.empty(shape, inputs[0], dtype)
            sizes = space.sizes(shape)
            dense = [space.dense(x) for x in inputs]
            kernel.launch((-(-total // block),), [*dense, out, total, *(sizes[i] for i in runtime)])
            return out

        return Kernel(run)


class TritonRows:
    """A block of rows a program: the row stays in registers from the first load to the only store."""

    name = "triton-rows"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_rows(region)
        if isinstance(made, str):
            return made
        width = next_power_of_2(made.columns)
        if width <= 256:
            options: tuple[tuple[int, int], ...] = ((1024 // width, 4), (max(1, 512 // width), 2), (1, 1))
            return [{"rows": r, "warps": w} for r, w in options]
        options = ((1, 1), (1, 2), (1, 4), (2, 4)) if width <= 1024 else ((1, 4), (1, 8), (1, 16))
        return [{"rows": r, "warps": w} for r, w in options]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_rows(region)
        assert isinstance(made, Rows)
        return [made.source(config["rows"], config["warps"], self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_rows(region)
        assert isinstance(made, Rows)
        rows = config["rows"]
        kernel = self._device.kernel(made.source(rows, config["warps"], self._device.arch))
        operands, space, columns = Operands(region, made.space, made.pointers), made.space, made.columns
        dtype = STORAGE[made.output.dtype]  # type: ignore[index]
        fallback = DeviceReference().bind(region, {}).run
        runtime = [i for i in range(1, len(space.axes) - 1) if space.axes[i].size is None]

        def run(*args: Any) -> Any:
            inputs = operands(args)
            shape = torch.broadcast_shapes(*(x.shape for x in inputs))
            count = shape.numel() // columns
            if count >= 2**31 or not space.admits(shape, inputs):
                return fallback(*args)
            out = space.empty(shape, inputs[0], dtype)
            sizes = space.sizes(shape)
            dense = [space.dense(x) for x in inputs]
            kernel.launch((-(-count // rows),), [*dense, out, count, *(sizes[i] for i in runtime)])
            return out

        return Kernel(run)
