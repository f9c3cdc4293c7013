"""Convolutions as cuDNN plans with bias, residual and activation fused."""

from __future__ import annotations

from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import FLOATS
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.lib.cudnn import ConvPlan, ConvProblem
from venturi.backends.cuda.tactics.conv import (
    NHWC,
    ConvFrame,
    matched_convolution,
    nhwc,
    pack_sources,
    read_convolution,
)
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import static_shape
from venturi.kernels.cudnn import frontend
from venturi.ops.tensors import STORAGE

T = torch.Tensor
MAX_PLANS = 10
_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Swish", "Gelu")


def steps_of(region: RegionView, tile: TileBody) -> tuple[tuple[str, float | None], ...] | str:
    """What follows the convolution in cuDNN's words, or what it has no word for."""
    has_bias = len(region.anchor.inputs) > 2 and region.anchor.inputs[2] is not None
    if len(tile.columns) > int(has_bias):
        return "a constant a channel after the bias"
    steps: list[tuple[str, float | None]] = [("bias", None)] if has_bias else []
    for node in region.nodes[1:]:
        attrs = region.attrs(node)
        if node.op_type == "Add" and any(v is t for t in tile.tiles for v in node.inputs):
            steps.append(("add", None))
        elif node.op_type not in _ACTIVATIONS or attrs.get("approximate", "none") != "none":
            return f"no cuDNN operation for {node.op_type}"
        else:
            steps.append((node.op_type, attrs.get("alpha", 1.0) if node.op_type == "Swish" else None))
    return tuple(steps)


class CudnnConv:
    """Every plan cuDNN offers for the problem is a candidate, up to a limit; the choice is frozen by index and name."""

    name = "cudnn-conv"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        if frontend() is None:
            return "nvidia-cudnn-frontend is not installed"
        problem = self._problem(region)
        return problem if isinstance(problem, str) else [{"plan": i} for i in range(MAX_PLANS)]

    def _problem(self, region: RegionView) -> ConvProblem | str:
        conv = read_convolution(region, FLOATS)
        if isinstance(conv, str):
            return conv
        g, node = conv.geometry, region.anchor
        image, weight, output = (static_shape(v) for v in (*node.inputs[:2], node.outputs[0]))
        if image is None or output is None or weight is None or 0 in image:
            return "cuDNN plans need fixed shapes"
        if g.pads[:2] != g.pads[2:]:
            return "pads differ from side to side"
        unit = conv.element.aligned
        if g.channels % unit or g.outputs % unit or g.channels // g.groups % unit:
            return f"{g.channels} to {g.outputs} channels in {g.groups} groups: multiples of {unit} are needed"
        if conv.dtype not in FLOATS or conv.tile.output.dtype != conv.dtype:
            return "not floating point, or another output type"
        steps = steps_of(region, conv.tile)
        if isinstance(steps, str):
            return steps
        image[1], weight[1] = g.channels, g.channels // g.groups
        return ConvProblem(
            tuple(image), tuple(weight), tuple(output), g.pads[:2], g.strides, g.dilations, STORAGE[conv.dtype], steps,
            conv.tf32,
        )  # fmt: skip

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        conv = matched_convolution(region)
        return pack_sources(region, conv, self._device)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv, problem = matched_convolution(region), self._problem(region)
        assert isinstance(problem, ConvProblem)
        given = tuple(static_shape(region.anchor.inputs[0]) or ())
        plan, fallback = ConvPlan(problem, config["plan"]), DeviceReference().bind(region, {}).run
        weight, frame = conv.weights(region), ConvFrame(region, conv, self._device)
        columns = conv.tile.column_tensors(region)
        positions = [region.position(v) or 0 for v in conv.tile.tiles]

        def run(*args: Any) -> Any:
            x: T = args[conv.first]
            if tuple(x.shape) != given:
                return fallback(*args)
            out = torch.empty(problem.output, dtype=x.dtype, device=x.device, memory_format=NHWC)
            plan.run(frame.image(x), weight, out, [*columns, *(nhwc(args[p]) for p in positions)])
            return out

        return Kernel(run)
