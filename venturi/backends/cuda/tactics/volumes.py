"""3-D convolutions as cuDNN plans with bias, residual and activation fused, channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.tile import TileBody, read_tile
from venturi.backends.cuda.lib.cudnn import ConvPlan, ConvProblem
from venturi.backends.cuda.tactics.cudnn import MAX_PLANS, steps_of
from venturi.backends.cuda.tactics.operands import read_operands
from venturi.backends.cuda.tactics.products import TileOperands
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import static_shape
from venturi.kernels.cudnn import frontend
from venturi.ops.tensors import STORAGE

T = torch.Tensor
_LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Volumes:
    problem: ConvProblem
    weight: ir.Value
    tile: TileBody
    first: int


def read_volumes(region: RegionView) -> Volumes | str:
    """Of floating point and fixed shapes, with constant weights [outputs, channels / groups, D, H, W]; or why it is
    none."""
    given = read_operands(region, "Conv", 3)
    if isinstance(given, str):
        return given
    image, shape, output = static_shape(given.image), given.shape, static_shape(region.anchor.outputs[0])
    if image is None or output is None or 0 in (*image, *output):
        return "cuDNN plans need fixed shapes"
    if region.outputs[0].dtype != given.element.dtype:
        return "another output type"
    attrs, unit = region.attrs(region.anchor), given.element.aligned
    groups = attrs.get("group", 1)
    if any(n % unit for n in (image[1], shape[0], image[1] // groups)):
        return f"{image[1]} to {shape[0]} channels in {groups} groups: multiples of {unit} are needed"
    pads = attrs.get("pads") or [0] * 6
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or pads[:3] != pads[3:] or min(pads) < 0:
        return "pads differ from side to side"
    tile = read_tile(region, 1, given.bias)
    if isinstance(tile, str):
        return tile
    steps = steps_of(region, tile)
    if isinstance(steps, str):
        return steps
    strides, dilations = attrs.get("strides") or [1, 1, 1], attrs.get("dilations") or [1, 1, 1]
    problem = ConvProblem(
        tuple(image), shape, tuple(output), tuple(pads[:3]), tuple(strides), tuple(dilations),
        STORAGE[given.element.dtype], steps, region.tf32,
    )  # fmt: skip
    return Volumes(problem, given.weight, tile, given.first)


class CudnnVolumes:
    """Every plan that cuDNN offers is a candidate, up to a limit. Results have the channels last."""

    name = "cudnn-conv-3d"

    def match(self, region: RegionView) -> list[Config] | str:
        if frontend() is None:
            return "nvidia-cudnn-frontend is not installed"
        found = read_volumes(region)
        return found if isinstance(found, str) else [{"plan": i} for i in range(MAX_PLANS)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_volumes(region)
        assert isinstance(made, Volumes)
        problem, operands = made.problem, TileOperands(region, made.tile)
        plan, fallback = ConvPlan(problem, config["plan"]), DeviceReference().bind(region, {}).run
        weight: T = region.constant(made.weight).contiguous(memory_format=_LAST)

        def run(*args: Any) -> Any:
            x: T = args[made.first]
            if tuple(x.shape) != problem.image:
                return fallback(*args)
            out = torch.empty(problem.output, dtype=x.dtype, device=x.device, memory_format=_LAST)
            tiles = [t.contiguous(memory_format=_LAST) for t in operands.tiles(args)]
            plan.run(x.contiguous(memory_format=_LAST), weight, out, [*operands.columns, *tiles])
            return out

        return Kernel(run)
